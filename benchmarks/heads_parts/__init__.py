"""Parts of benchmarks/heads.py: each measures one thing and writes its section of the page."""
