"""A branch that sees other images in the place of those that a model was given: its vision encoder runs once more."""

import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..core.hooks import Hook, called_with
from ..core.sites import AttentionSite
from ..vision.images import image_layout, needed_layout
from ..vision.latest import forget_pass, latest_pass
from ..vision.outliers import places_of, unknown_images
from .text import TextDecodingVariant, decoder_sites
from .variant import BranchStep, Step

NOISE_STEPS = 1000  # of the schedule that images go into noise by (arXiv 2311.16922)


class OtherImagesVariant(TextDecodingVariant):
    """A decoding variant with a branch of the same tokens and positions, whose image tokens are those of other images.

    `generate` encodes images before the first forward, repeats them for beams, and cuts them with prompts in chunks: so
    tokens are known again by their values.
    """

    name = ""  # in the registry

    @property
    def seen(self) -> SimpleNamespace:
        """Of the vision encoder: .own, .changed what it gave for the images and for the changed ones; .queries of the
        changed ones; .tokens, .others `(M, E)` image tokens of both."""
        return latest_pass(self.name)

    def change(self, pixels: torch.Tensor) -> torch.Tensor:
        """Other pixels, of pictures `(N, C, H, W)` or of one image's patches `(n, D)`."""
        raise NotImplementedError(f"{type(self).__name__} must define change(pixels).")

    @classmethod
    def fit(cls, config: Any, model: nn.Module, sites: Sequence[AttentionSite]) -> tuple[Any, Sequence[AttentionSite]]:
        needed_layout(model, cls.name)
        return config, decoder_sites(model, sites)[-1:]

    def prepare(self, model: nn.Module) -> None:
        super().prepare(model)
        layout = image_layout(model)
        self.video_token_id, self.is_tiled = layout.video_token_id, layout.is_tiled
        self.makes_tokens_itself = layout.features == layout.tower

    def hooks(self, model: nn.Module) -> list[Hook]:
        layout = image_layout(model)
        found = [Hook(model.get_submodule(layout.tower), "after", self.after_tower)]
        if layout.query_former is not None:
            found.append(Hook(model.get_submodule(layout.query_former), "after", self.after_query_former))
        if not self.makes_tokens_itself:
            found.append(Hook(model.get_submodule(layout.features), "after", self.after_features))
        return [*super().hooks(model), *found]

    def after_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.is_active and output is None:  # a forward that failed
            forget_pass(self.name)
        super().after_model(module, args, kwargs, output)

    @torch.no_grad()
    def after_tower(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self.is_active:
            return
        given = called_with(module, args, kwargs)
        pixels = [name for name, one in given.items() if isinstance(one, torch.Tensor) and one.is_floating_point()]
        if len(pixels) != 1:
            raise NotImplementedError(
                f"{type(self).__name__} changes the images that {type(module).__name__} is called with, and cannot "
                f"tell which of {sorted(given)} they are."
            )
        changed = torch.cat([self.change(part) for part in _pictures(given[pixels[0]], given)])
        forget_pass(self.name)
        self.seen.own, self.seen.changed = output, module.forward(**{**given, pixels[0]: changed})
        if self.makes_tokens_itself:
            self.seen.tokens, self.seen.others = self.seen.own.pooler_output, self.seen.changed.pooler_output

    @torch.no_grad()
    def after_query_former(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self.is_active:
            again = module.forward(*args, **{**kwargs, "encoder_hidden_states": self.seen.changed[0]})
            self.seen.queries = again[0][:, : kwargs["query_embeds"].shape[1]]

    @torch.no_grad()
    def after_features(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: torch.Tensor) -> None:
        if not self.is_active:
            return
        states = getattr(self.seen, "queries", None)
        if states is None:
            states = self._same_states(module, args[0])
        self.seen.tokens, self.seen.others = output.detach().flatten(0, 1), module.forward(states).flatten(0, 1)

    def _same_states(self, module: nn.Module, wanted: torch.Tensor) -> torch.Tensor:
        """Of the changed images, the very hidden states that image tokens are made of."""
        for own, changed in zip(_layers(self.seen.own), _layers(self.seen.changed), strict=True):
            start = own.shape[1] - wanted.shape[1]
            if start >= 0 and torch.equal(own[:, start:], wanted):
                return changed[:, start:]
        raise NotImplementedError(
            f"{type(self).__name__} knows image tokens that are made of one layer of the vision encoder; here "
            f"{type(module).__name__} was given something else."
        )

    def with_other_images(self, step: Step) -> BranchStep:
        """A branch of the same tokens, in whose images' place others are.

        Raises:
            NotImplementedError: there is a video.
            ValueError: the images were not made by the patched model just before.
        """
        same = self.same(step)
        if self.video_token_id is not None and bool(step.where(self.video_token_id).any()):
            raise NotImplementedError(f"{type(self).__name__} does not support videos.")
        if not bool(same.image.any()):
            return same
        known, others = getattr(self.seen, "tokens", None), getattr(self.seen, "others", None)
        if known is None or others is None:
            raise unknown_images()
        tokens = step.embeddings[same.image]
        places = places_of(known.to(tokens), tokens)
        is_known = places >= 0
        if not bool(is_known.any() if self.is_tiled else is_known.all()):  # newlines between rows are of no image
            raise unknown_images()
        found = torch.where(is_known[:, None], others.to(tokens)[places.clamp(min=0)], tokens)
        return replace(same, embeddings=step.embeddings.masked_scatter(same.image[..., None], found))


def noised(pixels: torch.Tensor, step: int, seed: int | None) -> torch.Tensor:
    """Normalised pixels `(N, C, H, W)`, or one image's patches `(n, D)`, so far into noise, of `NOISE_STEPS`.

    Args:
        pixels: what the vision encoder gets.
        step: how far, from 0.
        seed: of noise that every image gets alike; None: torch's own generator draws anew for every image.
    """
    kept = kept_variance(step)
    shape = pixels.shape if seed is None or pixels.dim() == 2 else pixels.shape[1:]
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator, dtype=torch.float32).to(pixels)
    return math.sqrt(kept) * pixels + math.sqrt(1.0 - kept) * noise


def kept_variance(step: int) -> float:
    """Of pixels with the variance 1, the part that is the image's at a step of the noise schedule, from 0."""
    rates = torch.linspace(-6.0, 6.0, NOISE_STEPS, dtype=torch.float64).sigmoid() * (0.005 - 1e-5) + 1e-5
    return float((1.0 - rates[: step + 1]).prod())


def _pictures(pixels: torch.Tensor, beside: dict[str, Any]) -> Sequence[torch.Tensor]:
    """Pixels `(N, C, H, W)`; or packed patches `(n, D)` by image, whose numbers of rows and columns are beside."""
    if pixels.dim() > 2:
        return [pixels]
    grids = [one for one in beside.values() if isinstance(one, torch.Tensor) and one.dim() == 2 and one is not pixels]
    counts = [grid.prod(-1).tolist() for grid in grids if int(grid.prod(-1).sum()) == len(pixels)]
    if not counts:
        raise NotImplementedError(f"It is not known which of {len(pixels)} packed patches are one image's.")
    return pixels.split(counts[0])


def _layers(output: Any) -> list[torch.Tensor]:
    """All hidden states that an encoder gave."""
    states = getattr(output, "hidden_states", None) or ()
    return [state for state in (*states, output.last_hidden_state) if state is not None]
