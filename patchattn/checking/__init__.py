"""Checks of a patch, of an installation, of all model types."""
