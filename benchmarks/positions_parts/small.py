"""A small Llama that reads text and recalls values by their keys, trained to 512 tokens in minutes on one core."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import patchattn

CHARACTERS, KEYS, FACTS, TRAINED = 128, 16, 8, 512
VALUES = CHARACTERS + KEYS
SAID = VALUES + KEYS  # from here on, one token says one key's value
# Steps, rows of a step and their length: short rows first, on which recall is learned sooner.
STAGES = ((400, 48, 48), (150, 16, 192), (150, 8, TRAINED))


def characters(text: str) -> np.ndarray:
    """Tokens of text: its ASCII characters, all others left out."""
    return np.frombuffer(text.encode("ascii", "ignore"), dtype=np.uint8).astype(np.int64)


def recall_row(
    text: np.ndarray, length: int, draw: np.random.Generator, start: int | None = None, clean: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `(length,)` and which of them are answers: tokens that each say the value of a key, at random places in a
    text, then every key with its value.

    Args:
        text: tokens of a text.
        length: of the row.
        draw: where, and what.
        start: of the text's tokens the first one; drawn by default.
        clean: so many last tokens of the text have nothing among them.
    """
    keys, values = draw.permutation(KEYS)[:FACTS], draw.integers(KEYS, size=FACTS)
    filler = length - 3 * FACTS
    start = int(draw.integers(len(text) - filler)) if start is None else start
    places = np.sort(draw.integers(filler + 1 - clean, size=FACTS))
    order = draw.permutation(FACTS)
    asked = np.stack([CHARACTERS + keys[order], VALUES + values[order]], axis=1).reshape(-1)
    tokens = np.concatenate([np.insert(text[start : start + filler], places, SAID + keys * KEYS + values), asked])
    is_answer = np.zeros(length, dtype=bool)
    is_answer[length - 2 * FACTS + 1 :: 2] = True
    return tokens, is_answer


def built(seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": SAID + KEYS**2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=TRAINED, initializer_range=0.1))


def losses(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """`(B, T - 1)` in nats, of every token but the first."""
    return nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), tokens[:, 1:], reduction="none")


def train(model: Any, text: np.ndarray, seed: int) -> list[float]:
    """Train it, and say the last loss of answers of every stage, in nats."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, weight_decay=0.01)
    total = sum(steps for steps, _, _ in STAGES)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=total, pct_start=0.1)
    draw, ends = np.random.default_rng(seed), []
    for steps, rows, length in STAGES:
        answers = torch.tensor(float("nan"))
        bar = tqdm(range(steps), desc=f"rows of {length}", mininterval=10)
        for _ in bar:
            drawn = [recall_row(text, length, draw) for _ in range(rows)]
            tokens, is_answer = (torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True))
            each = losses(model(tokens).logits, tokens)
            is_text = (tokens < CHARACTERS)[:, 1:]
            answers = each[is_answer[:, 1:]].mean()
            optimizer.zero_grad()
            (0.5 * each[is_text].mean() + answers).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(answers=f"{answers.item():.2f}", refresh=False)
        ends.append(round(answers.item(), 4))
    return ends


def trained(folder: Path, text: Path, seed: int, *, scaled: bool) -> Any:
    """The model of a seed, with SSMax or without, from its file in the folder, or trained and written there."""
    model = built(seed)
    if scaled:
        patchattn.patch_model(model, "ssmax", preset="from_scratch")
    path = folder / f"small{'-ssmax' if scaled else ''}-{seed}.safetensors"
    if path.exists():
        load_model(model, path)
    else:
        print(train(model.train(), characters(text.read_text("utf-8")), seed))
        folder.mkdir(parents=True, exist_ok=True)
        save_model(model, str(path))
    return model.eval()
