"""The tasks of `patchattn eval`."""
