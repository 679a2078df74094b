"""ACT against attention matrices written out from the equations, in float64."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AttentionInterface, DynamicCache, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

import patchattn
from patchattn.core.kv_caches import cache_argument

from .families import FAMILIES, outputs

DEFAULTS = {"sink_rule": "mean", "alpha": 1.0, "threshold": 0.1, "beta": 0.4, "keep_first": True}


def calibrate(weights: np.ndarray, visible: np.ndarray, ends: list[int], settings: dict[str, Any]) -> np.ndarray:
    """The equations on one head's matrix `(N, N)`, for calls that end after `ends` rows.

    Args:
        weights: softmax, zero where not visible.
        visible: which keys a row sees; a row of padding sees none.
        ends: rows up to which each call goes: all rows of a call see the sinks of the rows up to its end.
        settings: as ACT's.
    """
    s, out = {**DEFAULTS, **settings}, weights.copy()
    for start, end in zip([0, *ends], ends, strict=False):
        sinks = []
        for t in range(len(weights)):
            seeing = [i for i in range(end) if visible[i, t]]
            if not seeing:
                continue
            received = sum(weights[i, t] for i in seeing) / len(seeing)
            longest = max(visible[i].sum() for i in seeing)
            is_first = not any(visible[i, :t].any() for i in seeing)
            limit = s["alpha"] / longest if s["sink_rule"] == "mean" else s["threshold"]
            if received > limit and not (s["keep_first"] and is_first):
                sinks.append(t)
        for i in range(start, end):
            others = [t for t in range(len(weights)) if t not in sinks and weights[i, t] > 0]
            rest = sum(weights[i, t] for t in others)
            if rest < np.finfo(np.float64).eps ** 0.5:  # nowhere to move attention to
                continue
            freed = (1 - s["beta"]) * sum(weights[i, t] for t in sinks)
            out[i, sinks] = s["beta"] * weights[i, sinks]
            for t in others:
                out[i, t] = weights[i, t] + freed * weights[i, t] / rest
    return out


@contextmanager
def brute_force(
    model: nn.Module, ends: list[int], settings: dict[str, Any], chosen: Callable[[int, int], bool]
) -> Iterator[nn.Module]:
    """The unpatched model, computing attention as N x N matrices and calibrating those of the chosen (layer, head)."""

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        batch, heads, rows, dim = query.shape
        repeat = heads // key.shape[1]
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        logits = query @ key.mT * (kwargs.get("scaling") or dim**-0.5)
        if kwargs.get("softcap"):
            logits = kwargs["softcap"] * torch.tanh(logits / kwargs["softcap"])
        if kwargs.get("position_bias") is not None:
            logits = logits + kwargs["position_bias"]
        visible = torch.ones(1, 1, rows, key.shape[2], dtype=torch.bool) if mask is None else mask > -1e30
        visible = visible.expand(batch, heads, -1, -1)
        sinks = kwargs.get("s_aux")
        logits = logits.masked_fill(~visible, -1e300)
        if sinks is not None:
            logits = torch.cat([logits, sinks[None, :, None, None].expand(batch, -1, rows, 1)], -1)
        weights = (logits.softmax(-1)[..., : key.shape[2]] * visible).detach().numpy().copy()
        for b in range(batch):
            real = visible[b, 0].diagonal().numpy()
            seen = visible[b, 0].numpy() & real[:, None]
            for h in range(heads):
                if chosen(module.layer_idx, h):
                    weights[b, h] = calibrate(weights[b, h] * real[:, None], seen, ends, settings)
        return (torch.from_numpy(weights) @ value).transpose(1, 2), None

    AttentionInterface.register("brute_force", attend)
    AttentionMaskInterface.register("brute_force", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("brute_force")
    try:
        yield twin
    finally:
        AttentionInterface._global_mapping.pop("brute_force")
        AttentionMaskInterface._global_mapping.pop("brute_force")


def tokens(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(2))


def everywhere(layer: int, head: int) -> bool:
    return True


def expected(model: nn.Module, ends: list[int], chosen: Any = everywhere, inputs: Any = None, **settings: Any) -> Any:
    with brute_force(model, ends, settings, chosen) as twin:
        return outputs(twin, **(inputs or {"input_ids": tokens()}), use_cache=False)[0]


def close(left: torch.Tensor, right: torch.Tensor) -> None:
    """Rows that see little but sinks lose half of the digits, for which the factor of the other keys is large."""
    torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


SETTINGS = [
    {},
    {"alpha": 0.9, "beta": 0.0},
    {"keep_first": False},
    {"sink_rule": "fixed", "threshold": 0.2, "beta": 0.25},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_forward(family: str, settings: dict[str, Any]) -> None:
    model = FAMILIES[family].make_exact()
    wanted = expected(model, [12], **settings)
    plain = outputs(model, input_ids=tokens())[0]
    patchattn.patch_model(model, "act", **{"alpha": 1.0, **settings})
    close(outputs(model, input_ids=tokens())[0], wanted)
    assert float((plain - wanted).abs().max()) > 1e-2


@pytest.mark.parametrize(
    ("implementation", "heads"),
    [("eager", {1: [0, 3]}), ("sdpa", [(0, 2), (1, 1), (1, 2)]), ("flex_attention", {1: [0, 3]})],
    ids=str,
)
def test_chosen_heads(implementation: str, heads: Any) -> None:
    model = FAMILIES["llama"].make_exact()
    listed = [(1, 0), (1, 3)] if isinstance(heads, dict) else heads
    wanted = expected(model, [12], lambda layer, head: (layer, head) in listed)
    model.set_attn_implementation(implementation)
    patchattn.patch_model(model, "act", alpha=1.0, heads=heads)
    if implementation == "flex_attention":  # which knows no float64; `test_seam.py` compiles it
        with torch.compiler.set_stance("force_eager"):
            got = outputs(model.float(), input_ids=tokens())[0]
        torch.testing.assert_close(got, wanted.float(), rtol=1e-3, atol=1e-3)
    else:
        close(outputs(model, input_ids=tokens())[0], wanted)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_capped_logits_and_learned_sinks(family: str) -> None:
    model = FAMILIES[family].make()
    exact = copy.deepcopy(model).double()
    patchattn.patch_model(model, "act", alpha=1.0)
    got = outputs(model, input_ids=tokens())[0].double()
    torch.testing.assert_close(got, expected(exact, [12]), rtol=1e-3, atol=1e-3)


def test_position_bias_and_an_encoder_without_causality() -> None:
    model = FAMILIES["t5"].make_exact().get_encoder()
    wanted = outputs(patchattn.patch_model(copy.deepcopy(model), "act", alpha=1.0), input_ids=tokens())[0]
    for layer in model.block:
        layer.layer[0].SelfAttention.layer_idx = 0
    close(wanted, expected(model, [12], alpha=1.0, inputs={"input_ids": tokens()}))


@pytest.mark.parametrize("chunks", [[6, 1, 1, 1, 1, 1, 1], [5, 4, 1, 2], [1] * 12], ids=str)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_decoding_uses_all_rows_so_far(family: str, kind: str, chunks: list[int]) -> None:
    model = FAMILIES[family].make_exact()
    ends = np.cumsum(chunks).tolist()
    wanted = expected(model, ends)
    assert float((wanted - expected(model, [12])).abs().max()) > 1e-3
    patchattn.patch_model(model, "act", alpha=1.0)
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=15)
    parts = [
        outputs(model, input_ids=chunk, **cache_argument(model, cache))[0] for chunk in tokens().split(chunks, dim=1)
    ]
    close(torch.cat(parts, dim=1), wanted)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["none", "dynamic", "static"])
def test_padding_is_in_no_sum(side: str, kind: str) -> None:
    model, text = FAMILIES["llama"].make_exact(), tokens()
    real = slice(4, None) if side == "left" else slice(0, 8)
    mask = torch.zeros_like(text)
    mask[0], mask[1, real] = 1, 1
    patchattn.patch_model(model, "act", alpha=1.0)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    given: dict[str, Any] = {"use_cache": False}
    if kind != "none":
        cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=15)
        given = cache_argument(model, cache)
    together = outputs(model, input_ids=text, attention_mask=mask, position_ids=positions, **given)[0]
    patchattn.unpatch_model(model)
    close(together[:1], expected(model, [12], inputs={"input_ids": text[:1]}))
    close(together[1:, real], expected(model, [8], inputs={"input_ids": text[1:, real]}))


def test_generation_in_a_padded_batch_with_beams_scores_as_the_equations_do() -> None:
    model, text = FAMILIES["llama"].make_exact(), tokens(2, 7)
    mask = torch.ones_like(text)
    mask[1, :3] = 0
    base = copy.deepcopy(model)
    patchattn.patch_model(model, "act", alpha=1.0)
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "num_beams": 3}
    for implementation in (None, "static"):
        found = model.generate(
            text * mask,
            attention_mask=mask,
            **how,
            length_penalty=0.0,
            num_return_sequences=3,
            output_scores=True,
            return_dict_in_generate=True,
            cache_implementation=implementation,
            disable_compile=True,
        )
        for row, (sequence, score) in enumerate(zip(found.sequences, found.sequences_scores, strict=True)):
            sequence = sequence[3 * (row // 3) :][None]
            prompt = sequence.shape[1] - 5
            ends = [*range(prompt, prompt + 5)]
            logits = expected(base, [*ends, prompt + 5], inputs={"input_ids": sequence})[0, prompt - 1 : -1]
            log_p = logits.log_softmax(-1).gather(-1, sequence[0, prompt:, None]).sum()
            assert float(score) == pytest.approx(float(log_p), abs=1e-4)  # generate adds in float32


def test_a_second_generation_and_a_second_prompt_start_anew() -> None:
    model, text = FAMILIES["llama"].make_exact(), tokens(2, 7)
    patchattn.patch_model(model, "act", alpha=1.0)
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    for implementation in (None, "static"):
        first = model.generate(text, **how, cache_implementation=implementation, disable_compile=True)
        model.generate(text.flip(-1), **how, cache_implementation=implementation, disable_compile=True)
        again = model.generate(text, **how, cache_implementation=implementation, disable_compile=True)
        assert torch.equal(first, again)


def test_weights_of_the_eager_implementation_are_calibrated_and_sum_to_one() -> None:
    model = FAMILIES["llama"].make(implementation="eager").double()
    patchattn.patch_model(model, "act", alpha=1.0, heads={1: [1]})
    seen: dict[str, torch.Tensor] = {}
    with patchattn.observe(model, lambda observation: seen.update(observation.values)), torch.no_grad():
        attention = model(tokens(), output_attentions=True).attentions[1]
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4, 12, dtype=torch.float64), rtol=0, atol=1e-6)
    patchattn.unpatch_model(model)
    with torch.no_grad():
        plain = model(tokens(), output_attentions=True).attentions[1].numpy()
    visible = np.tril(np.ones((12, 12), dtype=bool))
    for row in range(2):
        changed = calibrate(plain[row, 1], visible, [12], {})
        np.testing.assert_allclose(attention[row, 1], changed, atol=1e-6)  # eager's softmax is in float32
        sinks = seen["sink_keys"][row, 0].numpy()
        np.testing.assert_allclose(plain[row, 1][:, sinks].sum(-1), seen["sink_mass"][row, :, 0], atol=1e-6)
        assert sinks.any()
    np.testing.assert_array_equal(attention[:, [0, 2, 3]], plain[:, [0, 2, 3]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_worse_than_twice_the_weights_rounded(dtype: torch.dtype) -> None:
    """The released form rounds the calibrated weights to the model's dtype."""
    from patchattn.core.chain import attention_call
    from patchattn.core.module_call import ModuleCall

    query, key, value = (
        torch.randn(1, 2, 64, 8, generator=torch.Generator().manual_seed(s)).to(dtype) for s in (0, 1, 2)
    )
    model = FAMILIES["llama"].make()
    patchattn.patch_model(model, "act", alpha=1.0, keep_first=False, heads={1: [0, 1]})
    module = model.model.layers[1].self_attn
    act = module.patchattn._modules["act"]
    call = attention_call(ModuleCall(module, query, key, value, None, {}), act.site, "sdpa")
    call.context.sequence_state = lambda *args, **kwargs: None  # type: ignore[method-assign]

    def inner(call: Any) -> Any:
        out = nn.functional.scaled_dot_product_attention(call.query, call.key, call.value, is_causal=True)
        return out.transpose(1, 2), None

    act.heads = act.heads[:2]
    got = act.attend(call, inner)[0].transpose(1, 2).double()
    logits = query.double() @ key.double().mT * call.scaling
    visible = torch.ones(64, 64, dtype=torch.bool).tril()
    weights = logits.masked_fill(~visible, -torch.inf).softmax(-1).numpy()
    changed = [calibrate(w, visible.numpy(), [64], {"alpha": 1.0, "keep_first": False}) for w in weights[0]]
    exact = torch.from_numpy(np.stack(changed))[None]
    reference = exact @ value.double()
    rounded = (exact.to(dtype) @ value).double()
    assert float((got - reference).abs().max()) <= 2 * float((rounded - reference).abs().max())
