"""The benchmark times nothing that is wrong, and its arithmetic is right."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from patchattn.bench import truth
from patchattn.bench.act import ACTProblem
from patchattn.bench.block_sparse import BlockSparseProblem
from patchattn.bench.cases import Case, suite
from patchattn.bench.ceilings import Ceilings, measure_ceilings
from patchattn.bench.goals import GOALS
from patchattn.bench.operands import TRAINED, make_operands
from patchattn.bench.problem import Check, Implementation, UnavailableError, Work, worst
from patchattn.bench.registry import PROBLEMS
from patchattn.bench.report import OPERATIONS
from patchattn.bench.result import Result
from patchattn.bench.routed import RoutedProblem, ours
from patchattn.bench.runner import run_case
from patchattn.bench.selected import SelectedProblem
from patchattn.bench.timing import LEAST, MOST, CPUStopwatch, Timing, measure

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy=1e9, products={"float32": 1e10, "bfloat16": 1e10})
SMOKE = {case.name: case for case in suite("smoke")}
FORWARD = Case("routed", "tiny", 40, active=0.5, dtype="float32")
TRAINING = dataclasses.replace(FORWARD, mode="training")


class Counting:
    """A stopwatch that says how often it was asked."""

    def __init__(self) -> None:
        self.runs = 0

    def laps(self, run: Callable[[], Any], count: int) -> list[float]:
        self.runs += count
        for _ in range(count):
            run()
        return [1e-3] * count


def results_of(case: Case, *implementations: Implementation, **options: Any) -> list[Result]:
    return list(run_case(case, CPU, CEILINGS, seconds=0.0, implementations=implementations or None, **options))


# What is run


@pytest.mark.parametrize("name", SMOKE)
def test_every_smoke_case_runs_verified(name: str) -> None:
    results = results_of(SMOKE[name], watch=Counting())
    assert {result.status for result in results} <= {"measured", "unavailable"}, [r.reason for r in results]
    assert results[0].status == "measured"
    assert all(result.reason for result in results if result.status == "unavailable")
    for result in results:
        if result.status == "measured":
            assert result.error is not None
            assert result.torch_error is not None
            assert result.torch_error < 2e-6, "torch's own kernel is right, so the truth is wrong"
            assert result.error <= 2 * result.torch_error + 1e-5


def test_smoke_has_every_operation_and_title() -> None:
    assert {case.op for case in SMOKE.values()} == set(PROBLEMS) == set(OPERATIONS)


def test_goals_suite_has_every_goal() -> None:
    assert {goal.case for goal in GOALS} <= set(suite("goals"))
    names = {goal.case.op: {i.name for i in PROBLEMS[goal.case.op].implementations} for goal in GOALS}
    for goal in GOALS:
        assert {*goal.of, *goal.over} <= names[goal.case.op]


def test_full_suite_has_all_shapes_and_lengths_and_no_case_twice() -> None:
    found = suite("full")
    assert len({case.name for case in found}) == len(found)
    assert {case.shape for case in found} == {"llama3_8b", "mha", "bert_base", "vit_b"}
    assert {case.tokens for case in found} == {2**power for power in range(10, 17)}
    assert {case.mode for case in found} == {"prefill", "decode", "training"}


def test_suite_refuses_what_it_has_not() -> None:
    with pytest.raises(ValueError, match=r"no suite 'all'.*goals, full, smoke"):
        suite("all")
    with pytest.raises(ValueError, match="no operation 'flash': it has routed"):
        suite("goals", ("flash",))


def test_triton_is_named_where_it_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    only = Implementation("patchattn", ours, "gated", kernel="routed_attention")
    monkeypatch.setenv("PATCHATTN_KERNELS", "reference")
    assert results_of(FORWARD, only, watch=Counting())[0].kernel == "plain torch"
    monkeypatch.setenv("PATCHATTN_KERNELS", "triton")
    (result,) = results_of(FORWARD, only, watch=Counting())
    assert (result.status, result.kernel) == ("measured", "Triton"), result.reason


# Verification


def broken(name: str, computes: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Implementation:
    """One of ours whose results are changed."""

    def make(problem: Any) -> Callable[[], dict[str, torch.Tensor]]:
        right = problem.implementations[0].make(problem)

        def run() -> dict[str, torch.Tensor]:
            outcome = {key: tensor.clone() for key, tensor in right().items()}
            change(outcome)
            return outcome

        return run

    return Implementation(name, make, computes, leeway=8.0)


def scale(key: str, factor: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(outcome: dict[str, torch.Tensor]) -> None:
        outcome[key] *= factor

    return change


def spoil_last_row(outcome: dict[str, torch.Tensor]) -> None:
    outcome["output"][:, :, -1] = float("nan")


def close_all_gates(outcome: dict[str, torch.Tensor]) -> None:
    outcome["output"].zero_()


def open_closed_gates(outcome: dict[str, torch.Tensor]) -> None:
    outcome["output"][outcome["output"] == 0] = 1e-3


WRONG = [
    (FORWARD, "gated", scale("output", 1.001)),
    (FORWARD, "gated", spoil_last_row),
    (FORWARD, "gated", close_all_gates),
    (FORWARD, "gated", open_closed_gates),
    (FORWARD, "dense", lambda outcome: None),  # routed, but said to be dense
    *((TRAINING, "gated", scale(name, 1.001)) for name in ("query", "key", "value", "gate")),
    (SMOKE["act tiny prefill 64 x2 float32"], "act", scale("output", 1.001)),
    (SMOKE["act tiny prefill 64 x2 float32"], "dense", lambda outcome: None),
    (SMOKE["column_mass tiny prefill 64 x2 float32"], "mass", scale("mass", 1.001)),
    *((SMOKE["split tiny prefill 64 x2 float32"], "split", scale(name, 1.001)) for name in ("output", "part", "mass")),
    (SMOKE["temperature tiny prefill 64 x2 float32"], "scaled", scale("value", 1.001)),
    (SMOKE["moh_layer tiny prefill 48 x2 50% moh float32"], "variant", scale("output", 1.001)),
    (SMOKE["moh_layer tiny prefill 48 x2 50% moh float32"], "dense", lambda outcome: None),
    (SMOKE["act_layer tiny prefill 64 x2 float32"], "variant", spoil_last_row),
    (SMOKE["block_sparse tiny prefill 96 x2 float32"], "dense", lambda outcome: None),
    (SMOKE["selected tiny decode 96 x2 50% float32"], "selected", scale("output", 1.001)),
    (SMOKE["selected tiny decode 96 x2 50% float32"], "dense", lambda outcome: None),
]


@pytest.mark.parametrize(("case", "computes", "change"), WRONG, ids=itertools.count())
def test_what_is_wrong_is_not_timed(case: Case, computes: str, change: Callable[..., None]) -> None:
    watch = Counting()
    (result,) = results_of(case, broken("broken", computes, change), watch=watch)
    assert (result.status, result.seconds, watch.runs) == ("wrong", None, 0), result
    assert "is allowed" in result.reason


def test_memory_that_is_never_written_does_not_pass() -> None:
    """Freed memory may hold the very result that a forgetful kernel does not write."""

    def make(problem: RoutedProblem) -> Callable[[], dict[str, torch.Tensor]]:
        return lambda: {"output": torch.empty_like(problem.operands.query)}

    (result,) = results_of(FORWARD, Implementation("forgetful", make, "gated", kernel="routed_attention"))
    assert result.status == "wrong"
    assert result.error != result.error
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("op", ["routed", "block_sparse"])
def test_gradients_by_formula_are_those_of_autograd(op: str) -> None:
    """The truth against autograd in float64 over all heads, each pair spelt out."""
    case = Case(op, "tiny", 20, "training", 0.5, dtype="float64", batch=2)
    o = make_operands(case, CPU)
    computes = "gated" if op == "routed" else "streaming"
    share = o.heads_per_group
    sinks, recent = o.window if op == "block_sparse" else (20, 20)
    hidden = torch.tensor([[j > i or (j >= sinks and i - j >= recent) for j in range(20)] for i in range(20)])
    logits = o.query @ o.key.repeat_interleave(share, 1).mT * o.rule.scaling
    output = logits.masked_fill(hidden, -torch.inf).softmax(-1) @ o.value.repeat_interleave(share, 1)
    leaves = {"query": o.query, "key": o.key, "value": o.value}
    if o.gate is not None:
        o.gate = o.gate.detach().double().requires_grad_()
        output = output * o.gate.transpose(1, 2)[..., None]
        leaves["gate"] = o.gate
    grads = dict(zip(leaves, torch.autograd.grad(output, list(leaves.values()), o.grad), strict=True))
    if o.gate is not None:
        grads["gate"] = grads["gate"] * (o.gate != 0)
    outcome = {"output": output.detach(), **grads}
    for check in (truth.check_rows(o, computes, outcome), truth.check_gradients(o, computes, outcome)):
        assert check.error < 1e-12


def test_planted_sinks_are_the_only_ones() -> None:
    problem = ACTProblem(Case("act", "tiny", 64, dtype="float32", batch=2), CPU)
    for piece in truth.pieces(problem.operands):
        means = truth.column_means(problem.operands, piece)
        planted = torch.zeros(64, dtype=torch.bool)
        planted[problem.operands.sinks] = True
        assert means[:, planted].min() > 1.5 * truth.ACT_THRESHOLD
        assert means[:, ~planted].max() < 0.5 * truth.ACT_THRESHOLD


def test_ours_is_asked_for_most() -> None:
    for problem in PROBLEMS.values():
        for each in problem.implementations:
            assert each.leeway == (2.0 if each.kernel else 8.0 if each.name == "eager N x N" else 4.0)


def test_check() -> None:
    assert Check(2.1e-3, 1.05e-3).passes(2.0)
    assert not Check(2.2e-3, 1.05e-3).passes(2.0)
    assert Check(2.2e-3, 1.05e-3).passes(4.0)
    assert not Check(float("nan"), 1.0).passes(8.0)
    assert worst([Check(1e-3, 1e-2, "a"), Check(1e-3, 1e-3, "b"), Check(5e-3, 1e-2, "c")]).what == "b"
    assert worst([Check(1.0, 1e-3, "a"), Check(float("nan"), 1e-3, "b")]).what == "b"


# Whatever else comes of an implementation


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UnavailableError("no kernel for this"), "unavailable"),
        (RuntimeError("No available kernel. Aborting execution."), "unavailable"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("an illegal memory access"), "failed"),
        (KeyError("missing"), "failed"),
    ],
)
@pytest.mark.parametrize("when", ["make", "run"])
def test_other_endings_are_results(error: Exception, status: str, when: str) -> None:
    def raise_it() -> dict[str, torch.Tensor]:
        raise error

    def make(problem: Any) -> Callable[[], dict[str, torch.Tensor]]:
        return raise_it if when == "run" else raise_it()  # type: ignore[return-value]

    first, second = results_of(FORWARD, Implementation("x", make, "gated"), RoutedProblem.implementations[0])
    assert (first.status, second.status) == (status, "measured")
    assert str(error.args[0]) in first.reason


def test_what_the_time_limit_cut_off_is_told() -> None:
    results = results_of(FORWARD, deadline=0.0)
    assert [r.implementation for r in results] == [i.name for i in RoutedProblem.implementations]
    assert {r.status for r in results} == {"not run"}


def test_operands_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("patchattn.bench.attention.make_operands", fail)
    assert {result.status for result in results_of(FORWARD)} == {"out of memory"}


# Arithmetic


def test_timing_by_a_fake_clock() -> None:
    durations = [9.0, 2.0, 2.0, 2.0, 1.0, 4.0, 2.0, 3.0, 5.0]  # warm-up, three to see how long it takes, five timed
    ticks: Iterator[float] = iter([tick for n, d in enumerate(durations) for tick in (100.0 * n, 100.0 * n + d)])
    runs = []
    timing = measure(lambda: runs.append(1), CPUStopwatch(lambda: next(ticks)), seconds=10.0)
    assert timing == Timing(median=3.0, low=2.0, high=4.0, repeats=5)
    assert len(runs) == len(durations)


@pytest.mark.parametrize(("seconds", "repeats"), [(0.0, LEAST), (0.02, 20), (1e9, MOST)])
def test_repeats_fit_into_the_time(seconds: float, repeats: int) -> None:
    assert measure(lambda: None, Counting(), seconds=seconds).repeats == repeats


def test_floor_and_share() -> None:
    ceilings = Ceilings(copy=100.0, products={"float32": 10.0})
    assert ceilings.floor(Work(flops=50.0, bytes=200.0), "float32") == 5.0
    assert ceilings.floor(Work(flops=5.0, bytes=200.0), "float32") == 2.0
    result = Result(FORWARD, "x", "measured", seconds=10.0, useful_flops=5e13, floor=2.0)
    assert (result.share_of_ceiling, result.useful_tflops) == (0.2, 5.0)


def test_ceilings_are_measured() -> None:
    found = measure_ceilings(CPU, {"float32"}, seconds=0.0)
    assert found.copy > 1e7
    assert found.products["float32"] > 1e7


def test_useful_work_of_routed_attention() -> None:
    o = (problem := RoutedProblem(dataclasses.replace(FORWARD, batch=2), CPU)).operands
    assert o.gate is not None
    pairs = sum(i + 1 for b, i, h in itertools.product(range(2), range(40), range(4)) if o.gate[b, i, h] != 0)
    rows, dim, size = int((o.gate != 0).sum()), 16, 4
    assert rows == 2 * 40 * 2
    moved = (rows + 2 * 2 * 2 * 40 + 2 * 4 * 40) * dim * size + o.gate.numel() * 4
    assert problem.work() == Work(4.0 * pairs * dim, moved)
    training = RoutedProblem(dataclasses.replace(TRAINING, batch=2), CPU)
    pairs = sum(i + 1 for b, i, h in torch.nonzero(training.operands.gate).tolist())
    assert training.work().flops == 3.5 * 4.0 * pairs * dim


def test_decoding_reads_live_groups_only() -> None:
    case = Case("routed", "tiny_encoder", 32, "decode", 0.25, dtype="float32", batch=3)
    problem = RoutedProblem(case, CPU)  # one kv head per query head, one query head of four on
    assert problem.work().bytes == (3 + 2 * 3 * 32) * 16 * 4 + 3 * 4 * 4 + 3 * 4 * 16 * 4


def test_useful_work_of_windows() -> None:
    problem = BlockSparseProblem(Case("block_sparse", "tiny", 50, dtype="float32"), CPU)
    sinks, recent = problem.operands.window
    pairs = sum(j <= i and (j < sinks or i - j < recent) for i in range(50) for j in range(50))
    assert problem.work().flops == 4.0 * pairs * 16 * 4


def test_useful_work_of_selected_pages() -> None:
    problem = SelectedProblem(SMOKE["selected tiny decode 96 x2 50% float32"], CPU)
    pages = problem.operands.given_pages
    assert [len({*line}) for line in pages.flatten(0, 1).tolist()] == [
        3
    ] * 4  # of six pages, by two kv heads of two rows
    assert problem.work() == Work(4.0 * 2 * 4 * 48 * 16, (2 * 2 * 2 * 48 + 2 * 2 * 4) * 16 * 4)


def test_trained_pattern_keeps_heads_as_often_as_the_router_did() -> None:
    o = make_operands(Case("routed", "mha", 4096, active=0.5, pattern="trained"), CPU)
    assert o.gate is not None
    kept = (o.gate != 0).double()
    assert (kept.sum(-1) == 16).all()
    wanted = torch.tensor(TRAINED, dtype=torch.float64).repeat_interleave(4)  # of 8 heads, and here are 32
    assert (kept.mean((0, 1)) - wanted).abs().max() < 0.04
    with pytest.raises(ValueError, match="keeps 50% of the heads, not 25%"):
        make_operands(Case("routed", "mha", 16, active=0.25, pattern="trained"), CPU)


def test_moh_pattern_shares_heads() -> None:
    o = make_operands(Case("routed", "bert_base", 64, active=0.5, pattern="moh"), CPU)
    assert o.gate is not None
    assert ((o.gate != 0).sum(-1) == 6).all()
    assert (o.gate[..., :4] != 0).all()
    assert not (o.gate[..., 4] != 0).all()
