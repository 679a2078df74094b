"""What several commands do: keep transformers quiet, and read settings."""

from collections.abc import Sequence
from typing import Any


def quiet() -> None:
    """What transformers says while loading, such as that an encoder's head is new, is not news here."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def language_model(name: str, device: str | None) -> tuple[Any, Any]:
    """The tokenizer of a causal language model, and the model, on a device and in evaluation mode; quietly."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..saving.pretrained import load_pretrained
    from .devices import choose_device

    quiet()
    tokenizer = load_pretrained(AutoTokenizer, name)
    return tokenizer, load_pretrained(AutoModelForCausalLM, name, dtype="auto").eval().to(choose_device(device))


def parse_settings(pairs: Sequence[str], option: str = "--set") -> dict[str, Any]:
    """`["active_ratio=0.5"]` as a dictionary; values are read as YAML."""
    from ..files.documents import parse_yaml

    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise ValueError(f"{option} expects name=value, got {pair!r}.")
        settings[key.strip()] = parse_yaml(value, f"{option} {pair}", has_lines=False)
    return settings
