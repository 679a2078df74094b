"""Variants whose attention asks which tokens are image tokens (`vision.marks.image_tokens`)."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..core.hooks import Hook, note_token_ids
from ..core.run import current_run, end_run
from ..core.selection import base_model
from ..core.sites import AttentionSite
from ..core.variant import Variant
from .images import ImageLayout, image_layout
from .marks import with_true_image_tokens


class ImageTokenVariant(Variant):
    """A variant that is told in its attention which tokens are image tokens, by hooks on the language model."""

    def hooks(self, model: nn.Module) -> list[Hook]:
        base: Any = base_model(model)
        layout = image_layout(base)
        self.placeholders = layout.placeholders
        language_model = base.get_submodule(layout.language_model)
        return [
            Hook(base.get_input_embeddings(), "before", self.before_embedding),
            Hook(language_model, "before", self.before_language_model),
            Hook(language_model, "finally", self.after_language_model),
            Hook(base, "finally", self.after_model),
        ]

    def before_embedding(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        note_token_ids(args, kwargs)

    def before_language_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        owner = type(self).__name__
        return with_true_image_tokens(owner, self.placeholders, module, self.before_embedding, args, kwargs)

    def after_language_model(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        current_run().token_ids = None

    def after_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        end_run()


def language_model_sites(sites: Sequence[AttentionSite], layout: ImageLayout, *, by: str) -> list[AttentionSite]:
    """Those of the attention modules that are in the language model.

    Raises:
        ValueError: none is; the message names who asks.
    """
    inside = [site for site in sites if site.name.startswith(f"{layout.language_model}.")]
    if not inside:
        raise ValueError(f"{by} acts in {layout.language_model}; none of the chosen attention modules is in it.")
    return inside
