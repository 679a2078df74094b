"""Task vectors and function vectors of pairs of questions and answers, and the layer at which they do best."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import nn

from ..core.importance import HeadImportance
from ..core.layer_vectors import LayerVectors
from ..core.patching import patched
from ..inspection.head_means import head_means
from ..inspection.task_vectors import first_token_accuracy, function_vector, indirect_effects, layer_means
from .few_shot import TEMPLATE, FewShotBatch, few_shot_prompts, question_prompts

Kind = Literal["task", "function"]


@dataclass(frozen=True)
class FoundVectors:
    """A vector, and how well it does.

    Attributes:
        vectors: of the layer that does best.
        layer: that one.
        accuracy: of questions alone, by layer: share of first answer tokens that are right with the vector there.
        without: the same without a vector.
        effects: of every head, where they were measured.
    """

    vectors: LayerVectors
    layer: int
    accuracy: dict[int, float]
    without: float
    effects: HeadImportance | None


def find_vectors(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    kind: Kind = "task",
    layers: Sequence[int] | None = None,
    shots: int = 10,
    count: int = 100,
    trials: int = 25,
    heads: int = 10,
    held: float = 0.3,
    template: str = TEMPLATE,
    seed: int = 0,
    batch_size: int = 8,
    modules: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FoundVectors:
    """Find the vector of a task. The layer is chosen on pairs that no demonstration shows.

    Args:
        model: a causal language model in evaluation mode, not patched.
        tokenizer: of the model; with a padding token.
        pairs: questions and answers of the task.
        kind: `task`: the residual stream at the end of demonstrations, put in the place of another prompt's (arXiv
            2310.15916). `function`: what a few heads give there, added to another prompt's (arXiv 2310.15213).
        layers: behind which to try it; all by default.
        shots: demonstrations of a prompt.
        count: prompts that means are taken over.
        trials: with `function`, prompts with shuffled answers that effects of heads are measured on, a forward for
            every head and batch.
        heads: with `function`, how many, those of the largest effects.
        held: share of the pairs to choose the layer on, at least one.
        template: as of `few_shot_prompts`.
        seed: of what is drawn.
        batch_size: prompts of a forward.
        modules: which attention modules, as in `patch_model`.
        progress: called with the steps done and their number.

    Raises:
        ValueError: no such kind, a share that is not between 0 and 1, no such layer, or as `few_shot_prompts`.
    """
    if kind not in ("task", "function"):
        raise ValueError(f"kind is 'task' or 'function', got {kind!r}.")
    if not 0.0 < held < 1.0:
        raise ValueError(f"held is a share between 0 and 1, got {held}.")
    order = np.random.default_rng(seed).permutation(len(pairs)).tolist()
    size = max(1, round(held * len(pairs)))
    asked, shown = [pairs[place] for place in order[:size]], [pairs[place] for place in order[size:]]
    how: dict[str, Any] = {"template": template, "batch_size": batch_size}
    questions = question_prompts(tokenizer, asked, **how)
    how |= {"shots": shots, "seed": seed}
    demonstrations = [batch.inputs for batch in few_shot_prompts(tokenizer, shown, count=count, **how)]
    effects = None
    if kind == "task":
        known = layer_means(model, demonstrations, modules=modules)
    else:
        shuffled = few_shot_prompts(tokenizer, shown, count=trials, shuffled=True, **how)
        means = head_means(model, demonstrations, rows="last", modules=modules)
        inputs, answers = [batch.inputs for batch in shuffled], [batch.answers for batch in shuffled]
        effects = indirect_effects(model, inputs, answers, means, modules=modules)
        best = effects.highest(heads).to_dict()
        one = {layer: function_vector(model, means, best, layer=layer, modules=modules) for layer in means.vectors}
        known = LayerVectors({layer: each.vectors[layer] for layer, each in one.items()}, means.base)
    accuracy = {}
    for layer in sorted(known.vectors if layers is None else layers):
        with patched(model, f"{kind}_vectors", vectors=known.at(layer).to_dict()):
            accuracy[layer] = _accuracy(model, questions)
        if progress is not None:
            progress(len(accuracy), len(known.vectors if layers is None else layers))
    layer = max(accuracy, key=lambda each: (accuracy[each], -each))
    return FoundVectors(known.at(layer), layer, accuracy, _accuracy(model, questions), effects)


def _accuracy(model: nn.Module, batches: Sequence[FewShotBatch]) -> float:
    return first_token_accuracy(model, [batch.inputs for batch in batches], [batch.answers for batch in batches])
