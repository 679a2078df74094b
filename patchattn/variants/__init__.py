"""The published variants, by mechanism, one file or package per paper. The registry imports each by name."""
