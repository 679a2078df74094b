"""Sampling some tokens several times and keeping the best of them, chunk after chunk: a driver of `generate`.

`model.generate(..., do_sample=True, custom_generate=BestOfChunks(score))` hands over what `generate` has made of its
arguments; nothing of `generate` is copied but that tokens are drawn one after the other.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.generation import GenerateDecoderOnlyOutput

from ..core.kv_caches import find_cache
from ..files.documents import quoted


@dataclass(frozen=True, eq=False)
class Chunk:
    """The tokens of a chunk, of every candidate of every sequence.

    Attributes:
        ids: `(N, T)` the whole sequences, the chunk included; the candidates of a sequence lie side by side.
        real: `(N, c)` bool: which of the last c tokens were drawn, and do not fill up a sequence that has ended.
        looks: `(N, c, F)` what `ChunkScore.look` gave before each of them was drawn; `None` if it looks at nothing.
    """

    ids: torch.Tensor
    real: torch.Tensor
    looks: torch.Tensor | None


class ChunkScore:
    """Judges chunks. A subclass gives `score`, and `watching` and `look` if it needs more than the tokens."""

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Around a whole text, such as for a probe on the model."""
        yield

    def look(self) -> torch.Tensor | None:
        """`(rows, F)` what is known of every sequence after a forward, with which its next token is drawn."""
        return None

    def score(self, chunk: Chunk) -> torch.Tensor:
        """`(N,)` of each candidate: the largest one of a sequence's is kept, the first of equal ones."""
        raise NotImplementedError(f"{type(self).__name__} must define score(chunk).")


class BestOfChunks:
    """Draws candidates of the next tokens from one kv cache, keeps the best one with its cache, and goes on from there.

    For `generate(custom_generate=...)`. Temperature, top-p and all else that `generate` puts between logits and tokens
    acts as without it; with one candidate the text is the one that `generate` samples from the same seed. Every
    sequence of a batch keeps its own best.

    Args:
        score: judges a chunk.
        candidates: how many are drawn for each sequence.
        chunk: of so many tokens; the last one may be shorter.

    Raises:
        ValueError: less than one candidate or token.
    """

    def __init__(self, score: ChunkScore, *, candidates: int = 8, chunk: int = 8) -> None:
        if min(candidates, chunk) < 1:
            raise ValueError(f"Expected at least one candidate and one token, got {candidates} and {chunk}.")
        self.score, self.candidates, self.chunk = score, candidates, chunk

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        **model_kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | torch.Tensor:
        """Called by `generate`.

        Raises:
            NotImplementedError: beams, no kv cache or a static one, a model with an encoder, a cache that is filled
                already, inputs besides text, scores or attention in the output, or several processes in step.
        """
        _refuse(model, generation_config, model_kwargs, synced_gpus)
        run = _Run(model, input_ids, dict(model_kwargs))
        with self.score.watching(model):
            run.prefill()
            look = self.score.look()
            while not bool(run.done.all()):
                look = self._chunk(run, look, logits_processor, stopping_criteria, generation_config)
        if not generation_config.return_dict_in_generate:
            return run.ids
        return GenerateDecoderOnlyOutput(sequences=run.ids)

    def _chunk(
        self, run: "_Run", look: torch.Tensor | None, processor: Any, criteria: Any, config: Any
    ) -> torch.Tensor | None:
        """Draw a chunk of every candidate and keep the best ones; returns what is known of them for the next token."""
        run.repeat(self.candidates)
        look = None if look is None else look.repeat_interleave(self.candidates, dim=0)
        real, looks = [], []
        for _ in range(self.chunk):
            real.append(~run.done)
            if look is not None:
                looks.append(look)
            run.draw(processor, criteria, config)
            if bool(run.done.all()):
                break
            run.forward()
            look = self.score.look()
        chunk = Chunk(run.ids, torch.stack(real, dim=1), torch.stack(looks, dim=1) if looks else None)
        scores = self.score.score(chunk)
        if scores.shape != (len(run.ids),):
            raise ValueError(f"Expected a score of each of {len(run.ids)} candidates, got {tuple(scores.shape)}.")
        best = scores.view(-1, self.candidates).argmax(dim=-1)
        rows = torch.arange(len(best), device=best.device) * self.candidates + best
        run.select(rows.to(run.ids.device))
        return None if look is None else look[rows.to(look.device)]


class _Run:
    """The sequences while they are written."""

    def __init__(self, model: Any, ids: torch.Tensor, kwargs: dict[str, Any]) -> None:
        self.model, self.ids, self.kwargs = model, ids, kwargs
        self.done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        self.logits = torch.empty(0)  # (rows, V) float32, of the next token

    def prefill(self) -> None:
        self._run(is_first_iteration=True)

    def forward(self) -> None:
        self._run(next_sequence_length=1)

    def _run(self, **how: Any) -> None:
        inputs = self.model.prepare_inputs_for_generation(self.ids, **how, **self.kwargs)
        outputs = self.model(**inputs, return_dict=True)
        self.kwargs = self.model._update_model_kwargs_for_generation(outputs, self.kwargs)
        self.logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=self.ids.device)

    def draw(self, processor: Any, criteria: Any, config: Any) -> None:
        """One token more of each sequence, padding of those that are done, or as `generate` their end once more."""
        scores = processor(self.ids, self.logits)
        tokens = torch.multinomial(scores.softmax(-1), 1)[:, 0] if config.do_sample else scores.argmax(-1)
        filler = [config.pad_token_id, *np.ravel(config.eos_token_id)]
        known = [one for one in filler if one is not None]
        if known:
            tokens = tokens.masked_fill(self.done, int(known[0]))
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=-1)
        self.done = self.done | criteria(self.ids, None)

    def repeat(self, count: int) -> None:
        cache = find_cache(self.kwargs.values())
        if count > 1 and cache is not None:
            cache.batch_repeat_interleave(count)
        self._each(lambda tensor: tensor.repeat_interleave(count, dim=0))

    def select(self, rows: torch.Tensor) -> None:
        cache = find_cache(self.kwargs.values())
        if cache is not None and len(rows) < len(self.ids):
            cache.batch_select_indices(rows)
        self._each(lambda tensor: tensor[rows.to(tensor.device)])

    def _each(self, change: Any) -> None:
        """Change whatever has a row for each sequence."""
        self.ids, self.done, self.logits = change(self.ids), change(self.done), change(self.logits)
        given = self.kwargs.items()
        self.kwargs = {name: change(each) if isinstance(each, torch.Tensor) else each for name, each in given}


def _refuse(model: Any, config: Any, kwargs: Mapping[str, Any], synced_gpus: bool) -> None:
    """NotImplementedError for what chunks cannot be drawn with."""
    cache, fault = find_cache(kwargs.values()), None
    rows = {name for name in ("attention_mask", "position_ids") if name in kwargs}
    others = [name for name, each in kwargs.items() if isinstance(each, torch.Tensor) and name not in rows]
    asked = [name for name in ("scores", "logits", "attentions", "hidden_states") if getattr(config, f"output_{name}")]
    if model.config.is_encoder_decoder:
        fault = "a decoder-only language model"
    elif config.num_beams > 1:
        fault = f"num_beams=1, got {config.num_beams}"
    elif cache is None or cache.is_compileable:
        fault = "a dynamic kv cache: use_cache=True, without cache_implementation='static'"
    elif cache.get_seq_length():
        fault = "a new kv cache: give the whole text, without the cache of an earlier one"
    elif others or any(kwargs[name] is not None and kwargs[name].dim() != 2 for name in rows):
        fault = f"a prompt of text alone, got {quoted(others or sorted(rows))}"
    elif asked and config.return_dict_in_generate:
        fault = f"no output_{asked[0]}: steps of candidates that were dropped would be among them"
    elif config.prefill_chunk_size is not None:
        fault = "no prefill_chunk_size"
    elif synced_gpus:
        fault = "one process, or such as do not wait for each other"
    if fault is not None:
        raise NotImplementedError(f"BestOfChunks needs {fault}.")
