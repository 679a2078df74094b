"""Saved models and patches, on disk and on the Hub."""
