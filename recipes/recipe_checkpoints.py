"""Checkpoints that survive a kill: which of them are complete."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from patchattn.files.documents import read_json_object, write_json

FILES = "files.json"  # the last file of a checkpoint: what the others are, and how long
TRAINER_STATE = "trainer_state.json"  # the Trainer's name for it


def last_checkpoint(output: str | Path) -> str | None:
    """The newest checkpoint to go on from.

    It is complete: every file it should hold is there, as long as it was written; what a kill left half-written is
    passed over. So is a checkpoint of the last step, from which the Trainer would train one step too many.
    """
    folders = [path for path in Path(output).glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    for folder in sorted(folders, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if _can_go_on(folder):
            return str(folder)
    return None


def _can_go_on(folder: Path) -> bool:
    try:
        sizes, state = read_json_object(folder / FILES), read_json_object(folder / TRAINER_STATE)
        is_complete = all((folder / name).stat().st_size == size for name, size in sizes.items())
        return is_complete and state["global_step"] < state["max_steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


class CompleteCheckpoints(TrainerCallback):
    """Lists the files of a checkpoint in it, once every process has written its own."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the list."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if args.process_index == 0:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            files = (path for path in folder.rglob("*") if path.is_file() and path.name != FILES)
            write_json(folder / FILES, {str(path.relative_to(folder)): path.stat().st_size for path in files})
