"""Other normalisers than softmax, which a model starts without: their share in the weights is learned, from 0."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn

from ..core.call import AttentionCall
from ..core.settings import option
from ..core.sites import AttentionSite
from ..core.variant import VariantConfig
from ..files.documents import quoted
from .rows import RowVariant


@dataclass(frozen=True, kw_only=True)
class BlendConfig(VariantConfig):
    """Settings of a normaliser that takes the place of softmax by and by."""

    blend: float | None = option(
        0.0,
        help="Start of the learned share of these weights per head, the rest being softmax's: at 0 the model. None: "
        "these weights alone, without softmax.",
        source="ours, for pretrained models",
        minimum=0.0,
        maximum=1.0,
    )
    learned: bool = option(True, help="Train what is learned; False holds it.", source="ours")


class BlendedVariant(RowVariant):
    """Attention with weights `(1 - b) softmax(s) + b normalised(s)`, b a learned share per query head.

    One that leaves a pretrained model nothing where it is alone says so by `from_scratch`, and is then refused there.
    """

    config: BlendConfig
    blend: torch.Tensor | None

    def __init__(self, config: BlendConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        self.hold("blend", config.blend)

    def hold(self, name: str, start: float | None) -> None:
        """Have a number per query head: learned, or held where the settings say so."""
        heads = self.site.require("query_heads", by=type(self).__name__)
        value = None if start is None else torch.full((heads,), float(start))
        if self.config.learned:
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    @classmethod
    def fit(cls, config: Any, model: nn.Module, sites: Sequence[AttentionSite]) -> tuple[Any, Sequence[AttentionSite]]:
        """ValueError for a model with weights of its own that is to lose softmax at once, where that leaves nothing."""
        name = getattr(getattr(model, "config", None), "name_or_path", None)
        if cls.from_scratch is not None and config.blend is None and name:
            raise ValueError(
                f"{cls.__name__} without softmax (blend=None) is for models that are trained with it from scratch, and "
                f"this one was loaded from {quoted(name)}: leave blend at 0.0, which starts at the model. If its "
                "weights were trained so, blend=1.0 with learned=False says that."
            )
        return config, sites

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"blend": 0.0, "learned": False}

    @property
    def is_identity(self) -> bool:
        return self.config.blend == 0.0 and not self.config.learned

    def fast_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def normalised(self, logits: torch.Tensor, visible: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """`(B, H, R, Tk)` the other weights; arguments as of `weights`."""
        raise NotImplementedError(f"{type(self).__name__} must define normalised(logits, visible, call).")

    @final
    def weights(self, logits: torch.Tensor, visible: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        others = self.normalised(logits, visible, call)
        if self.blend is None:
            return others
        return logits.softmax(-1).lerp(others, self.blend.to(logits.dtype)[:, None, None])
