"""Grids in forwards that are compiled, exported, run again, copied or in threads, and towers that have none."""

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaModel,
    SwinConfig,
    SwinModel,
    VideoMAEConfig,
    VideoMAEModel,
    ViTMAEConfig,
    ViTMAEModel,
    VivitConfig,
    VivitModel,
    WhisperConfig,
    WhisperModel,
    YolosConfig,
    YolosModel,
)

import patchattn

from .grids import IMAGE, SEEN, SIZES, first, make, pixels, registered, vit


@pytest.fixture(autouse=True)
def reads() -> Iterator[None]:
    with registered():
        yield


def whisper() -> nn.Module:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 64}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return WhisperModel(WhisperConfig(**sizes, **heads, **ids)).encoder


@pytest.mark.parametrize(
    "how", [whisper, lambda: LlamaModel(LlamaConfig(**SIZES, vocab_size=64))], ids=["audio", "text"]
)
def test_what_has_no_patches_is_refused(how: Callable[[], nn.Module]) -> None:
    model = make(how)
    with pytest.raises(NotImplementedError, match="no grid of patches that is known: before its layers nothing cuts"):
        patchattn.patch_model(model, "reads")
    assert not any("patchattn" in module._modules for module in model.modules())


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "dropped patches": (
        lambda: ViTMAEModel(ViTMAEConfig(**SIZES, **IMAGE)),
        pixels(2, 3, 24, 24),
        "its patch embedding says an order of its own",
    ),
    "all patches, in random order": (
        lambda: ViTMAEModel(ViTMAEConfig(**SIZES, **IMAGE, mask_ratio=0.0)),
        pixels(2, 3, 24, 24),
        "its patch embedding says an order of its own",
    ),
    "tokens behind the patches": (
        lambda: YolosModel(YolosConfig(**SIZES, image_size=[24, 24], patch_size=8, num_detection_tokens=3)),
        pixels(2, 3, 24, 24),
        "its patches are not its last tokens, row by row",
    ),
    "frames": (
        lambda: VivitModel(VivitConfig(**SIZES, image_size=24, num_frames=4, tubelet_size=[2, 8, 8])),
        pixels(1, 4, 3, 24, 24),
        "its tokens lie along time, too",
    ),
    "frames, in layers that hand no keyword arguments on": (
        lambda: VideoMAEModel(VideoMAEConfig(**SIZES, image_size=24, patch_size=8, num_frames=4)),
        pixels(1, 4, 3, 24, 24),
        "its tokens lie along time, too",
    ),
    "windows": (
        lambda: SwinModel(
            SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 1], num_heads=[2, 2], window_size=4)
        ),
        pixels(2, 3, 32, 32),
        "attends over 16 tokens in a batch of 32, where the patch embedding made 256 in a batch of 2, as in windows",
    ),
}


@pytest.mark.parametrize(("how", "inputs", "text"), REFUSED.values(), ids=REFUSED)
@torch.no_grad()
def test_tokens_in_another_order_are_refused(how: Callable[[], nn.Module], inputs: dict[str, Any], text: str) -> None:
    model = patchattn.patch_model(make(how), "reads")
    with pytest.raises(NotImplementedError, match=f"no grid of patches that is known: .*{text}"):
        model(**inputs)
    with pytest.raises(NotImplementedError, match=text):  # and again, whatever was remembered
        model(**inputs)


@torch.no_grad()
def test_a_patch_embedding_that_turns_the_image() -> None:
    """Columns first: found by what it does, not by what it is called."""
    model = make(vit)
    patches = model.get_submodule("embeddings.patch_embeddings")

    class ByColumns(type(patches)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return super().forward(*args, **kwargs).unflatten(1, (3, 3)).transpose(1, 2).flatten(1, 2)

    patches.__class__ = ByColumns
    patchattn.patch_model(model, "reads")
    with pytest.raises(NotImplementedError, match="its patches are not its last tokens, row by row"):
        model(**pixels(1, 3, 24, 24))


@torch.no_grad()
def test_looking_for_the_order_changes_nothing() -> None:
    """Random numbers are as before, and an image of NaN is seen by its patches alone."""
    model = make(lambda: vit(hidden_dropout_prob=0.5)).train()
    inputs = pixels(2, 3, 24, 24)
    torch.manual_seed(1)
    plain = first(model, inputs)
    patchattn.patch_model(model, "reads")
    torch.manual_seed(1)
    assert torch.equal(first(model, inputs), plain)
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values() if tensor.is_floating_point())


@torch.no_grad()
def test_a_forward_that_fails_leaves_nothing() -> None:
    model = patchattn.patch_model(make(vit), "reads")
    with pytest.raises(ValueError, match="doesn't match model"):
        model(**pixels(1, 3, 16, 40))
    tower = model.get_submodule("layers.0.attention")
    with pytest.raises(NotImplementedError, match="no patch embedding before it was seen in this forward"):
        tower(torch.randn(1, 10, 32))
    assert model(**pixels(1, 3, 24, 24)) is not None


def gradients(model: nn.Module, inputs: list[dict[str, Any]]) -> list[torch.Tensor]:
    model.zero_grad()
    sum((first(model, each).square().mean() for each in inputs), torch.tensor(0.0)).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_activation_checkpointing() -> None:
    """Two forwards with as many patches in another shape, then one backward, which runs layers again."""
    inputs = [{**pixels(1, 3, *size), "interpolate_pos_encoding": True} for size in ((16, 40), (40, 16))]
    model = patchattn.patch_model(make(vit), "reads", strength=0.1).train()
    expected = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    SEEN.clear()
    found = gradients(model, inputs)
    assert len(SEEN) == 8  # the layers ran again
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend: str) -> None:
    inputs = pixels(2, 3, 24, 24)
    model = patchattn.patch_model(make(vit), "reads", strength=0.1)
    cold = torch.compile(copy.deepcopy(model), backend=backend, fullgraph=True)
    with pytest.raises(Exception, match="call the model once with images of 9 patches before it is compiled"):
        cold(**inputs)
    with torch.no_grad():
        expected = first(model, inputs)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(**inputs)[0], expected)


@torch.no_grad()
def test_exported() -> None:
    inputs = pixels(2, 3, 24, 24)
    model = patchattn.patch_model(make(vit), "reads", strength=0.1)
    expected = first(model, inputs)
    program = torch.export.export(model, (), inputs, strict=False)
    torch.testing.assert_close(program.module()(**inputs)[0], expected)


@torch.no_grad()
def test_copies_and_threads() -> None:
    inputs = [pixels(1, 3, 24, 24), {**pixels(1, 3, 16, 40), "interpolate_pos_encoding": True}]
    model = patchattn.patch_model(make(vit), "reads", strength=0.1)
    expected = [first(model, each) for each in inputs]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close([first(other, each) for each in inputs], expected)
        patchattn.unpatch_model(other)
        assert not any(other._forward_pre_hooks for other in other.modules())
    found: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def run(number: int) -> None:
        with torch.no_grad():
            found[number] = [first(model, inputs[number]) for _ in range(5)]

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, several in found.items():
        for output in several:
            torch.testing.assert_close(output, expected[number])


def test_no_hooks_where_nobody_asks() -> None:
    model = make(vit)
    patchattn.patch_model(model, "ssa")
    embeddings = model.get_submodule("embeddings")
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in embeddings.modules())
    patchattn.unpatch_model(model)
    patchattn.patch_model(model, "reads")
    assert embeddings._forward_hooks
