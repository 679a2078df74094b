"""Tasks to measure a patched model on, and their official metrics; some of it needs `pip install "patchattn[eval]"`."""

from .tasks.glue import GLUE_TASKS, GlueTask, download_glue, load_glue, read_glue

__all__ = ["GLUE_TASKS", "GlueTask", "download_glue", "load_glue", "read_glue"]
