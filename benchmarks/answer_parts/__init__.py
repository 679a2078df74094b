"""Forced answers of a model under methods that leave keys out: prompts, methods, scores, rows and pages."""
