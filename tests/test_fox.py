"""FoX against loops in float64, one token at a time, taken back, padded, and in half precision."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import patchattn
from patchattn.core.kv_caches import cache_argument
from patchattn.softmax.biases import KeyBiasVariant, running_sum

from .behaviour import positions, randomise, text, variant_parameters
from .families import FAMILIES, outputs
from .reference import DIM, HEADS, KV_HEADS, WIDTH, tiny_llama

TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5, 13], [2, 8, 8, 1, 30, 4, 6]])


def patched(**settings: Any) -> Any:
    torch.manual_seed(1)
    model = patchattn.patch_model(tiny_llama(), "fox", **settings)
    with torch.no_grad():
        for parameter in variant_parameters(model).values():
            parameter.normal_()
    return model


def looked_at(model: Any, tokens: torch.Tensor) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The call outside of all variants, what the layer read, and what attention gave."""
    seen: list[Any] = []
    with torch.no_grad(), patchattn.probed(model, lambda call, output: seen.append((call, output))):
        handle = model.model.layers[0].self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
        )
        model(tokens)
    handle.remove()
    states, (call, output) = seen
    return call, states, output


@pytest.mark.parametrize("scaled", [True, False])
def test_weights_are_those_of_the_paper(scaled: bool) -> None:
    model = patched(scaled=scaled)
    fox = model.model.layers[0].self_attn.patchattn.fox
    call, states, got = looked_at(model, TOKENS)
    weight, bias = fox.weight.detach(), fox.bias.detach()
    scale = fox.scale.detach() if scaled else torch.ones(HEADS)
    for sequence in range(2):
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            forget = [
                float(-scale[head] * (1 + (-(weight[head] @ states[sequence, t] + bias[head])).exp()).log())
                for t in range(TOKENS.shape[1])
            ]
            for i in range(TOKENS.shape[1]):
                logits = torch.stack(
                    [
                        call.query[sequence, head, i] @ call.key[sequence, group, j] * DIM**-0.5
                        + sum(forget[t] for t in range(j + 1, i + 1))
                        for j in range(i + 1)
                    ]
                )
                want = logits.softmax(-1) @ call.value[sequence, group, : i + 1]
                torch.testing.assert_close(got[sequence, i, head], want, rtol=0, atol=1e-10)


def test_it_starts_at_the_model_and_everything_learns_by_the_second_step() -> None:
    model = tiny_llama()
    before = outputs(model, input_ids=TOKENS)[0]
    patchattn.patch_model(model, "fox")
    assert patchattn.patch_info(model)["extra_parameters"] == HEADS * (WIDTH + 2)
    torch.testing.assert_close(outputs(model, input_ids=TOKENS)[0], before, rtol=0, atol=1e-12)
    parameters = variant_parameters(model)
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        (model(TOKENS).logits * torch.linspace(-1, 1, 50)).sum().backward()
        moved = {name: bool((tensor.grad.abs() > 0).all()) for name, tensor in parameters.items()}
        assert moved == {name: step == 1 or name.endswith("scale") for name in parameters}
        optimizer.step()


def test_the_gate_of_the_paper_forgets_at_once() -> None:
    model = patchattn.patch_model(tiny_llama(), "fox", scaled=False, initial_std=0.0)
    fox = model.model.layers[0].self_attn.patchattn.fox
    assert fox.scale is None
    assert fox.fast_parameters() == [fox.weight, fox.bias]
    seen: list[patchattn.Observation] = []
    with patchattn.observe(model, seen.append):
        model(TOKENS)
    torch.testing.assert_close(seen[0].values["forget"], torch.full((2, 7, HEADS), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("steps", [[7], [1] * 7, [3, 1, 2, 1]])
def test_tokens_taken_back_are_forgotten(steps: list[int]) -> None:
    model = patched()
    want = outputs(model, input_ids=TOKENS)[0]
    other = torch.tensor([[40, 41, 42], [33, 34, 35]])
    cache, at, got = None, 0, []
    with torch.no_grad():
        for step in steps:
            given = model(TOKENS[:, at : at + step], past_key_values=cache, use_cache=True)
            cache, at = given.past_key_values, at + step
            got.append(given.logits)
            model(other, **cache_argument(model, cache))
            cache.crop(-3)
    torch.testing.assert_close(torch.cat(got, dim=1), want, rtol=0, atol=1e-9)


def test_left_padding() -> None:
    model = patched()
    alone = outputs(model, input_ids=TOKENS[:1])[0]
    padded = torch.cat([torch.full((1, 3), 17), TOKENS[:1]], dim=1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(TOKENS[:1])], dim=1)
    got = outputs(model, input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))[0]
    torch.testing.assert_close(got[:, 3:], alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sizes", [[12], [9, 3], [9, 1, 1, 1]])
def test_a_text_that_goes_on_behind_padding(sizes: list[int]) -> None:
    """A prompt padded on the right: what comes after it is as if there were no padding between them."""
    model = FAMILIES["llama"].make_exact()
    patchattn.patch_model(model, "fox", initial_bias=0.5, scaled=False)
    tokens, mask = text(12, rows=1), torch.ones(1, 12, dtype=torch.long)
    mask[:, 5:9] = 0
    found, cache, done = [], DynamicCache(config=model.config), 0
    for size in sizes:
        part = slice(done, done + size)
        done += size
        given = {"attention_mask": mask[:, :done], "position_ids": positions(mask)[:, part]}
        found += [outputs(model, input_ids=tokens[:, part], **given, past_key_values=cache)[0]]
    alone = outputs(model, input_ids=tokens[mask.bool()][None])[0]
    torch.testing.assert_close(torch.cat(found, dim=1)[mask.bool()][None], alone, rtol=1e-9, atol=1e-9)


def test_a_sliding_window_that_was_left_behind() -> None:
    model = patchattn.patch_model(FAMILIES["mistral"].make().double(), "fox")
    randomise(model)
    tokens = torch.randint(1, 50, (1, 24), generator=torch.Generator().manual_seed(0))
    want = outputs(model, input_ids=tokens)[0]
    cache, got = None, []
    with torch.no_grad():
        for at in range(24):
            given = model(tokens[:, at : at + 1], past_key_values=cache, use_cache=True)
            cache = given.past_key_values
            got.append(given.logits)
    torch.testing.assert_close(torch.cat(got, dim=1), want, rtol=0, atol=1e-9)


def test_a_cache_that_let_go_of_keys_is_refused() -> None:
    model = patchattn.patch_model(
        tiny_llama(), ["streaming_llm", "fox"], config={"streaming_llm": {"recent": 4, "sinks": 1}}
    )
    with (
        pytest.raises(NotImplementedError, match=r"fox .* remembers something of every key and cannot go on where"),
        torch.no_grad(),
    ):
        model.generate(TOKENS[:1].repeat(1, 20), max_new_tokens=3)


class Given(KeyBiasVariant):
    """Biases as they are given."""

    def __init__(self, bias: torch.Tensor) -> None:
        torch.nn.Module.__init__(self)
        self.given = bias

    def key_bias(self, call: Any) -> torch.Tensor:
        return self.given


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_biases_keep_small_differences_in_half_precision(dtype: torch.dtype) -> None:
    """Biases down to -5000, some of which differ by 0.3: what is added to logits is right as in float32."""
    generator = torch.Generator().manual_seed(0)
    bias = -torch.arange(400, 0, -1) * 12.5 - torch.rand(1, 4, 400, generator=generator)
    bias[..., 100:110] = bias[..., 100:101] + 0.3 * torch.arange(10)
    query, key, value = (
        torch.randn(1, h, n, 16, generator=generator).to(dtype) for h, n in ((4, 2), (2, 400), (2, 400))
    )
    seen: list[Any] = []

    class Call:
        stands_alone = False

        def __init__(self, **given: Any) -> None:
            self.__dict__.update(given)

        def replace(self, **given: Any) -> Any:
            return Call(**{**self.__dict__, **given})

    def inner(call: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(call)
        keys = call.key.double().repeat_interleave(2, dim=1)
        return call.value, call.query.double() @ keys.mT * call.scaling

    call: Any = Call(query=query, key=key, value=value, scaling=0.25, kwargs={})
    _, logits = Given(bias).attend(call, inner)
    plain = query.double() @ key.double().repeat_interleave(2, dim=1).mT * 0.25
    torch.testing.assert_close(logits - plain, bias[:, :, None].expand(-1, -1, 2, -1).double(), rtol=1e-6, atol=1e-6)
    assert seen[0].value.shape[-1] == seen[0].key.shape[-1] == 24


def test_sums_go_on_from_what_was_remembered() -> None:
    new = torch.tensor([[[1.0, 2.0, 3.0]]])
    for first in (0, torch.tensor(0)):
        assert running_sum(torch.zeros(1, 1, 3), new, first).tolist() == [[[1, 3, 6]]]
    for first in (2, torch.tensor(2)):
        found = running_sum(torch.tensor([[[5.0, 7.0, 0.0, 0.0, 0.0]]]), new, first)
        assert found.tolist() == [[[5, 7, 8, 10, 13]]]
    one = running_sum(torch.tensor([[[5.0, 7.0, 0.0]]]), new[..., 1:2], 2)
    assert one.tolist() == [[[5, 7, 9]]]
    slots = running_sum(torch.tensor([[[5.0, 7.0, 0.0, 0.0, 0.0, 9.0]]]), new, torch.tensor(2))
    assert slots.tolist() == [[[5, 7, 8, 10, 13, 9]]]
