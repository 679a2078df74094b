"""Speed of generation: time to the first token, tokens per second and peak memory, on random prompts."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from ...core.settings import Settings, option
from .cost import Cost, measured
from .generation import check_generates
from .positions import check_positions
from .retrieval import check_list
from .task import EvalTask, Row


@dataclass(frozen=True, kw_only=True)
class SpeedSettings(Settings):
    """What is timed: every prompt length with every number of new tokens and every batch size.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range, an empty list or a value twice in one.
    """

    prompt_lengths: tuple[int, ...] = option((512, 2048), help="Lengths of the prompts.", unit="tokens", minimum=1)
    # with one new token there would be none to time after the first
    new_tokens: tuple[int, ...] = option((64,), help="Lengths of the answers.", unit="tokens", minimum=2)
    batch_sizes: tuple[int, ...] = option((1,), help="Numbers of prompts at once.", minimum=1)
    warmup: int = option(1, help="Runs before those that count, per combination.", minimum=0)
    repeats: int = option(5, help="Runs that count, per combination; medians of them are stated.", minimum=1)
    seed: int = option(0, help="Seed of the prompts.", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prompt_lengths", "new_tokens", "batch_sizes"):
            check_list(name, getattr(self, name))


class SpeedTask(EvalTask):
    """Greedy generation from random tokens, to an exact length: end tokens are not chosen.

    Every combination is a sample; samples are timed one after the other however they are batched. Rows say
    `prompt_tokens`, `new_tokens` and `batch_size`, and of every run that counts `first_token_times` and `times`
    (seconds) and `peaks` (bytes, None where memory cannot be measured; see `evaluation.tasks.cost.measured`). Of
    what a batch costs in other tasks, only `peak_memory` makes sense of several combinations.

    Scores are medians over runs: `tokens_per_second` (all tokens but the first ones, of all prompts of a batch, over
    the time after those), `first_token_seconds` and `peak_memory_mib`; of each combination, as in
    `tokens_per_second@prompt=512,new=64,batch=1`, and without `@` their geometric mean, for the memory the greatest.

    Args:
        settings: fields of `SpeedSettings`.

    Raises:
        TypeError, ValueError: a wrong or unknown setting.
    """

    name = "speed"
    main_score = "tokens_per_second"
    unit = "tokens/s"
    samples_are_draws = False  # but different sizes

    def __init__(self, **settings: Any) -> None:
        self.settings = SpeedSettings.from_dict(settings)
        given = self.settings
        self._combinations = list(product(given.prompt_lengths, given.new_tokens, given.batch_sizes))

    def __len__(self) -> int:
        return len(self._combinations)

    def identity(self) -> Mapping[str, Any]:
        """The settings; the runner adds the device."""
        return {"task_settings": self.settings.to_dict()}

    def check_model(self, model: Any, tokenizer: Any) -> None:
        """Refuse a model that cannot generate so much.

        Raises:
            ValueError: an encoder, a table of too few positions, or a tokenizer without padding token.
        """
        check_generates(model, tokenizer)
        check_positions(model, max(prompt + new for prompt, new, _ in self._combinations))

    def answer(self, model: Any, tokenizer: Any, indices: Sequence[int]) -> list[Row]:
        rows = [self._time(model, tokenizer, index) for index in indices]
        known = [peak for row in rows for peak in row["peaks"] if peak is not None]
        return [{**row, "peak_memory": max(known, default=None)} for row in rows]

    def score(self, rows: Sequence[Row]) -> dict[str, float]:
        """See the class."""
        found: dict[str, dict[str, float]] = {"tokens_per_second": {}, "first_token_seconds": {}, "peak_memory_mib": {}}
        for row in rows:
            combination = f"prompt={row['prompt_tokens']},new={row['new_tokens']},batch={row['batch_size']}"
            later = row["batch_size"] * (row["new_tokens"] - 1)
            rates = [later / (end - first) for first, end in zip(row["first_token_times"], row["times"], strict=True)]
            found["tokens_per_second"][combination] = statistics.median(rates)
            found["first_token_seconds"][combination] = statistics.median(row["first_token_times"])
            if None not in row["peaks"]:
                found["peak_memory_mib"][combination] = statistics.median(row["peaks"]) / 2**20
        scores = {
            name: max(values.values()) if name == "peak_memory_mib" else statistics.geometric_mean(values.values())
            for name, values in found.items()
            if values
        }
        each = {f"{name}@{key}": value for name, values in found.items() for key, value in values.items()}
        return scores | each

    def _time(self, model: Any, tokenizer: Any, index: int) -> Row:
        prompt_tokens, new_tokens, batch_size = self._combinations[index]
        prompts = self._prompts(model, tokenizer, index)
        runs = [
            _generate(model, prompts, new_tokens, tokenizer.pad_token_id)
            for _ in range(self.settings.warmup + self.settings.repeats)
        ][self.settings.warmup :]
        return {
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "batch_size": batch_size,
            "first_token_times": [run.first_token_seconds for run in runs],
            "times": [run.seconds for run in runs],
            "peaks": [run.peak_memory for run in runs],
        }

    def _prompts(self, model: Any, tokenizer: Any, index: int) -> torch.Tensor:
        """Random tokens `(B, T)`, no special ones: some stand for images, and padding would be masked."""
        prompt_tokens, _, batch_size = self._combinations[index]
        known = min(len(tokenizer), model.config.get_text_config().vocab_size)
        usual = torch.tensor(sorted(set(range(known)) - set(tokenizer.all_special_ids)))
        draw = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + index)
        return usual[torch.randint(len(usual), (batch_size, prompt_tokens), generator=draw)].to(model.device)


def _generate(model: Any, prompts: torch.Tensor, new_tokens: int, padding: int) -> Cost:
    with torch.inference_mode(), measured(model) as cost:
        tokens = model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=padding,
            stopping_criteria=[cost],
        )
    if (made := tokens.shape[1] - prompts.shape[1]) != new_tokens:
        raise ValueError(f"{type(model).__name__} stopped at {made} of {new_tokens} tokens: see its generation_config.")
    return cost
