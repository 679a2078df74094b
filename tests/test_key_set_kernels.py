"""ACT and VAR on Triton's kernels, in its interpreter, against the equations in float64 and against plain torch."""

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import patchattn
from patchattn.core.kv_caches import cache_argument
from patchattn_kernels import column_mass_triton, split_attention_triton

from . import vlms
from .families import FAMILIES, outputs
from .test_act import expected, tokens
from .var_reference import LOW
from .var_reference import expected as expected_of_var


@pytest.fixture(autouse=True)
def by_triton(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were launched."""
    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter is for machines without a GPU")
    monkeypatch.setenv("PATCHATTN_KERNELS", "triton")
    names: list[str] = []
    for module in (split_attention_triton, column_mass_triton):
        launch = module.launch

        def noted(kernel: Any, name: str, *args: Any, launch: Any = launch) -> None:
            names.append(name)
            launch(kernel, name, *args)

        monkeypatch.setattr(module, "launch", noted)
    # Few queries have kernels of their own.
    attend, few = split_attention_triton.attend, column_mass_triton.column_mass_few

    def noted_attend(query: Any, key: Any, value: Any, *args: Any) -> Any:
        names.append("log_sum_exp" if value is None else "attention")
        return attend(query, key, value, *args)

    def noted_few(*args: Any) -> Any:
        names.append("column_mass")
        return few(*args)

    monkeypatch.setattr(split_attention_triton, "attend", noted_attend)
    monkeypatch.setattr(column_mass_triton, "column_mass_few", noted_few)
    return names


def test_act(by_triton: list[str]) -> None:
    model = FAMILIES["llama"].make()
    wanted = expected(copy.deepcopy(model).double(), [12], lambda layer, head: layer == 1, alpha=0.9)
    patchattn.patch_model(model, "act", alpha=0.9, layers=[1])
    got = outputs(model, input_ids=tokens())[0]
    assert by_triton == ["log_sum_exp", "column_mass", "key_set"]
    torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-3)


def test_act_in_half_precision_leaves_out_the_base_implementation(by_triton: list[str]) -> None:
    model = FAMILIES["llama"].make(implementation="sdpa").half()
    exact = expected(copy.deepcopy(model).double(), [12], lambda layer, head: layer == 1)
    plain = outputs(model, input_ids=tokens())[0]
    patchattn.patch_model(model, "act", alpha=1.0, layers=[1])
    with pytest.MonkeyPatch.context() as patch:
        calls = []
        sdpa = torch.nn.functional.scaled_dot_product_attention
        patch.setattr(
            torch.nn.functional,
            "scaled_dot_product_attention",
            lambda *args, **kwargs: calls.append(1) or sdpa(*args, **kwargs),
        )
        got = outputs(model, input_ids=tokens())[0]
    assert len(calls) == 1  # layer 0's
    assert by_triton == ["attention", "column_mass", "key_set"]
    assert got.dtype == torch.float16
    assert float((got.double() - exact).abs().max()) < 2e-2 < float((plain.double() - exact).abs().max())


def test_act_in_a_padded_batch_with_a_cache_and_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = FAMILIES["llama"].make(), tokens(2, 7)
    mask = torch.ones_like(text)
    mask[1, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    patchattn.patch_model(model, "act", alpha=0.9, layers=[1], heads={1: [1, 2]})
    results = []
    for backend in ("triton", "reference"):
        monkeypatch.setenv("PATCHATTN_KERNELS", backend)
        cache, parts = DynamicCache(config=model.config), []
        for start, end in ((0, 6), (6, 7)):
            part = slice(start, end)
            given = {
                "attention_mask": mask[:, :end],
                "position_ids": positions[:, part],
                **cache_argument(model, cache),
            }
            parts.append(model(text[:, part], **given).logits)
        logits = torch.cat(parts, dim=1)[mask.bool()]
        gradients = torch.autograd.grad(logits.square().sum(), [p for p in model.parameters() if p.requires_grad])
        results.append([logits, *gradients])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


def test_var(by_triton: list[str]) -> None:
    model, given = vlms.make("llava"), vlms.inputs("llava")
    given = vlms.single(given, 0)
    settings = {**LOW, "first_layer": 1}
    exact = copy.deepcopy(model).double()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    wanted = expected_of_var(exact, inputs, settings)
    patchattn.patch_model(model, "var", **settings)
    with torch.no_grad():
        got = model(**given).logits
    assert by_triton == ["log_sum_exp", "key_set", "key_set", "key_set"]
    torch.testing.assert_close(got.double(), wanted.double(), rtol=1e-3, atol=1e-4)
