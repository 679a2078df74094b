"""Where MoH leaves its attention to dense kernels on a GPU, and how often a mask that all layers share is read."""

from typing import Any

import pytest
import torch

import patchattn
from patchattn_kernels import key_mask, routed_attention_if_faster
from patchattn_kernels.rows import AttentionRule

from .families import FAMILIES
from .reference import tiny_llama

routed_module: Any = __import__("sys").modules["patchattn_kernels.routed_attention"]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As on a GPU: Triton's kernels run by themselves; how many queries each call has."""
    calls: list[int] = []

    def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gate: torch.Tensor, *_: Any) -> Any:
        calls.append(query.shape[2])
        return value.new_zeros(*gate.shape, value.shape[-1]), gate

    monkeypatch.setattr(routed_module, "SHORTEST", 0)  # as on a GPU, where no length is too short
    monkeypatch.setattr(routed_module, "triton_runs", lambda *_, **__: True)
    monkeypatch.setattr(routed_module, "_forward", forward)
    return calls


@pytest.mark.parametrize(
    ("active", "queries", "taken"),
    [(0.5, 100, True), (0.74, 100, True), (0.75, 100, False), (1.0, 100, False), (1.0, 1, True), (None, 100, True)],
)
def test_dense_attention_is_taken_where_most_heads_are_active(
    active: float | None, queries: int, taken: bool, kernels: list[int]
) -> None:
    query, key = torch.randn(1, 4, queries, 16), torch.randn(1, 2, 100, 16)
    rule = AttentionRule(0.25, causal=True)
    found = routed_attention_if_faster(query, key, key, torch.ones(1, queries, 4), rule, active=active)
    assert (found is not None) == taken
    assert kernels == [queries] * taken


def test_kernels_that_are_insisted_on_are_taken(kernels: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHATTN_KERNELS", "triton")
    states = torch.randn(1, 4, 100, 16)
    rule = AttentionRule(0.25, causal=True)
    assert routed_attention_if_faster(states, states, states, torch.ones(1, 100, 4), rule, active=1.0) is not None
    assert kernels == [100]


@pytest.mark.parametrize(("ratio", "layers"), [(0.5, 2), (0.75, 0)])
def test_moh_says_how_many_heads_are_configured(ratio: float, layers: int, kernels: list[int]) -> None:
    model = patchattn.patch_model(tiny_llama(), "moh", active_ratio=ratio, shared_ratio=0.25, router="learned").eval()
    count = model.config.num_hidden_layers
    with torch.no_grad():
        model(torch.arange(80)[None] % 40 + 3)
    assert len(kernels) == (count if layers else 0)


def test_bounds_of_a_mask_are_worked_out_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    made: list[int] = []
    bounds = key_mask._bounds
    monkeypatch.setattr(key_mask, "_bounds", lambda seen: made.append(1) or bounds(seen))
    monkeypatch.setenv("PATCHATTN_KERNELS", "triton")
    model = patchattn.patch_model(FAMILIES["llama"].make(), "moh", active_ratio=0.5).eval()
    assert model.config.num_hidden_layers > 1
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    with torch.no_grad():
        model(torch.arange(24).view(2, 12) % 20 + 3, attention_mask=mask)
    assert len(made) == 1
