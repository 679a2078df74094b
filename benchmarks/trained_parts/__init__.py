"""Parts of benchmarks/trained.py: each measures one thing and writes its section of the page."""
