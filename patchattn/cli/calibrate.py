"""The commands `patchattn calibrate heads`, `curve`, `flap` and `massive`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    import torch

    from ..calibration.data import Task

Model = Annotated[str, typer.Argument(help="Folder or Hub id of a language model, a classifier or an encoder.")]
Method = Annotated[
    str, typer.Option(help="Method: michel, flap, amp or entropy; magnitude or random, which need no data.")
]
Texts = Annotated[
    Path | None,
    typer.Option(help="Texts: a .txt, .jsonl or .tsv file, or a folder of these; a classifier needs labels."),
]
Per = Annotated[
    str | None,
    typer.Option(
        help="Gradients that michel sums before taking their size: those of a token (default), example or batch."
    ),
]
FlapMetric = Annotated[str | None, typer.Option("--metric", help="Score of flap: wifv (default), ifv or wifn.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the method random.")]
Normalise = Annotated[bool, typer.Option(help="Compare heads within their layer.")]
Modules = Annotated[str | None, typer.Option(help="Regular expression that chooses attention modules.")]
Samples = Annotated[int | None, typer.Option(help="Rows to use, from the first on; all by default.", min=1)]
Length = Annotated[int, typer.Option(help="Longest row, in tokens.", min=2)]
BatchSize = Annotated[int, typer.Option(help="Rows of a forward.", min=1)]
Device = Annotated[str | None, typer.Option(help="Device, such as cuda; a GPU by default where there is one.")]


def calibrate_heads(
    model: Model,
    method: Method = "michel",
    data: Texts = None,
    output: Annotated[Path, typer.Option("--output", "--out", help="Where to write the scores.")] = Path(
        "importance.json"
    ),
    plot: Annotated[Path | None, typer.Option(help="Draw a heat map into this file, such as heads.png.")] = None,
    per: Per = None,
    metric: FlapMetric = None,
    seed: Seed = None,
    normalise: Normalise = True,
    modules: Modules = None,
    samples: Samples = None,
    length: Length = 512,
    batch_size: BatchSize = 8,
    device: Device = None,
) -> None:
    """Score every query head of a model, in one pass over data; a killed pass goes on where it was.

    The sums so far are kept in OUTPUT.state until the pass is done. `patch_model(model, "prune", sparsity=0.3,
    importance=OUTPUT)` takes the lowest heads out.
    """
    from ..core.selection import select_sites
    from ..inspection.head_importance import head_importance

    loading = _Loading(model, method, {"per": per, "metric": metric, "seed": seed})
    batches = loading.batches(data, samples, length, batch_size)
    loaded = loading.load(device)
    console, state = Console(highlight=False), output.with_name(output.name + ".state")
    if batches and state.exists():
        console.print(f"Going on from {state}", soft_wrap=True)
    with bar(console, "batches", len(batches)) as move:
        found = head_importance(
            loaded,
            batches,
            method,
            normalise=normalise,
            **loading.options,
            sites=select_sites(loaded, modules=modules),
            state=state if batches else None,
            progress=move,
        )
    found.save(output)
    state.unlink(missing_ok=True)
    heads = sum(map(len, found.scores.values()))
    console.print(f"{heads} heads scored on {found.tokens} tokens. Wrote {output}", soft_wrap=True)
    if plot is not None:
        from ..plotting import plot_head_importance

        plot_head_importance(found).savefig(plot)
        console.print(f"Wrote {plot}", soft_wrap=True)


def calibrate_curve(
    model: Model,
    test: Annotated[Path, typer.Option(help="Texts that accuracy (classifiers) or perplexity is measured on.")],
    every: Annotated[int, typer.Option(help="Heads to remove in a step.", min=1)],
    method: Method = "michel",
    data: Texts = None,
    until: Annotated[float, typer.Option(help="Share of the heads to remove in all.")] = 0.9,
    recompute: Annotated[bool, typer.Option(help="Score the heads anew after every step.")] = True,
    output: Annotated[Path, typer.Option("--output", "--out", help="Where to write the curve.")] = Path("curve.csv"),
    plot: Annotated[Path | None, typer.Option(help="Draw the curve into this file, such as curve.png.")] = None,
    per: Per = None,
    metric: FlapMetric = None,
    seed: Seed = None,
    normalise: Normalise = True,
    samples: Samples = None,
    length: Length = 512,
    batch_size: BatchSize = 8,
    device: Device = None,
) -> None:
    """Remove the least important heads of a model step by step, and measure it after each; the model is not written.

    Heads are masked, and every attention module keeps one. --samples counts for both kinds of data.
    """
    from ..calibration.pruning_curve import accuracy, perplexity, pruning_curve, write_curve

    loading = _Loading(model, method, {"per": per, "metric": metric, "seed": seed})
    batches = loading.batches(data, samples, length, batch_size)
    if loading.task == "none":
        raise ValueError(f"A curve needs a language model or a classifier, got {loading.config.architectures}.")
    tests = loading.read(test, samples, length, batch_size, labelled=True)
    loaded = loading.load(device)
    measure, name = (accuracy, "accuracy") if loading.task == "classify" else (perplexity, "perplexity")
    console = Console(highlight=False)
    with bar(console, "heads removed", None) as move:
        points = pruning_curve(
            loaded,
            batches,
            lambda pruned: measure(pruned, tests),
            every=every,
            until=until,
            method=method,
            recompute=recompute,
            normalise=normalise,
            progress=lambda point, most: move(point.removed, most),
            **loading.options,
        )
    write_curve(points, output, metric=name)
    console.print(
        f"{name} {points[0].value:.4f} with all heads, {points[-1].value:.4f} without {points[-1].removed} of them. "
        f"Wrote {output}",
        soft_wrap=True,
    )
    if plot is not None:
        from ..plotting import plot_pruning_curve

        plot_pruning_curve({method: points}, metric=name).savefig(plot)
        console.print(f"Wrote {plot}", soft_wrap=True)


def calibrate_flap(
    model: Model,
    data: Texts = None,
    output: Annotated[Path, typer.Option("--output", "--out", help="Where to write the statistics.")] = Path(
        "flap.safetensors"
    ),
    mlp: Annotated[bool, typer.Option(help="Channels of MLPs as well; without them heads alone can be pruned.")] = True,
    amp: Annotated[bool, typer.Option("--amp", help="The norms of heads as well, which metric=amp ranks by.")] = False,
    modules: Modules = None,
    samples: Samples = None,
    length: Length = 512,
    batch_size: BatchSize = 8,
    device: Device = None,
) -> None:
    """Statistics of what the projections back from heads and MLPs read, in one pass over data.

    `patch_model(model, "flap", statistics=OUTPUT, sparsity=0.2)` then takes out what fluctuates least.
    """
    from ..core.selection import select_sites
    from ..variants.pruning.flap import flap_statistics

    loading = _Loading(model, "flap", {})
    batches = loading.batches(data, samples, length, batch_size)
    loaded = loading.load(device)
    console, sites = Console(highlight=False), select_sites(loaded, modules=modules)
    with bar(console, "batches", len(batches) * (2 if amp else 1)) as move:
        found = flap_statistics(loaded, batches, sites=sites, mlp=mlp, amp=amp, progress=move)
    found.save(output)
    console.print(f"{len(found.channels)} projections of {found.base}. Wrote {output}", soft_wrap=True)


def calibrate_massive(
    model: Model,
    data: Texts = None,
    output: Annotated[Path, typer.Option("--output", "--out", help="Where to write what was found.")] = Path(
        "massive.json"
    ),
    plot: Annotated[Path | None, typer.Option(help="Draw sizes by layer into this file, such as massive.png.")] = None,
    threshold: Annotated[float, typer.Option(help="An entry is massive if its size is above this.", min=0.0)] = 100.0,
    ratio: Annotated[
        float, typer.Option(help="A massive entry is at least so many times the median of its text.", min=0.0)
    ] = 1000.0,
    modules: Modules = None,
    samples: Samples = None,
    length: Length = 512,
    batch_size: BatchSize = 8,
    device: Device = None,
) -> None:
    """Find massive activations behind a model's layers: which dimensions, at which tokens, how large.

    `patch_model(model, "massive", activations=OUTPUT)` then sets them to zero or to their mean.
    """
    from ..inspection.massive import massive_activations

    loading = _Loading(model, "flap", {})
    batches = loading.batches(data, samples, length, batch_size)
    loaded = loading.load(device)
    console = Console(highlight=False)
    with bar(console, "batches", len(batches)) as move:
        found = massive_activations(loaded, batches, threshold=threshold, ratio=ratio, modules=modules, progress=move)
    found.save(output)
    some = [each for each in found.layers if each.dimensions]
    dimensions = sorted({one for each in some for one in each.dimensions})
    told = f"{len(some)} of {len(found.layers)} layers are massive in the dimensions {dimensions}" if some else "None"
    console.print(f"{told}; texts: {found.sequences}. Wrote {output}", soft_wrap=True)
    if plot is not None:
        from ..plotting import plot_massive_activations

        plot_massive_activations(found).savefig(plot)
        console.print(f"Wrote {plot}", soft_wrap=True)


class _Loading:
    """What a command needs of a model: all that can be checked first, then the model itself."""

    def __init__(self, model: str, method: str, options: dict[str, Any]) -> None:
        from ..inspection.head_importance import check_options
        from ..inspection.importance_methods import METHODS

        check_options(method, **options)
        self.model, self.method, self.options = model, method, options
        self.wanted = METHODS[method]
        self.config: Any = None
        self.task: Task = "none"

    def batches(
        self, data: Path | None, samples: int | None, length: int, batch_size: int
    ) -> "list[dict[str, torch.Tensor]]":
        """Those that heads are scored on; none for a method without data."""
        from transformers import AutoConfig

        from ..calibration.data import read_texts, task_of
        from ..saving.pretrained import load_pretrained
        from .common import quiet

        if self.wanted.needs_data != (data is not None):
            raise ValueError(
                f"{self.method} {'needs --data' if data is None else 'looks at no data: leave out --data'}."
            )
        if data is not None:
            read_texts(data)  # a mistake there is told first
        quiet()
        self.config = load_pretrained(AutoConfig, self.model)
        self.task = task_of(self.config)
        if self.wanted.needs_gradients and self.task == "none":
            raise ValueError(
                f"{self.method} needs a loss: a language model or a classifier, got {self.config.architectures}."
            )
        if data is None:
            return []
        return self.read(data, samples, length, batch_size, labelled=self.wanted.needs_gradients)

    def read(
        self, path: Path, samples: int | None, length: int, batch_size: int, *, labelled: bool
    ) -> "list[dict[str, torch.Tensor]]":
        """Batches from files, with labels where the task has classes and they are wanted."""
        from transformers import AutoTokenizer

        from ..calibration.data import class_numbers, make_batches, read_texts
        from ..saving.pretrained import load_pretrained

        examples = read_texts(path)
        labels = class_numbers(examples, self.config) if labelled and self.task == "classify" else None
        tokenizer = load_pretrained(AutoTokenizer, self.model)
        how: dict[str, Any] = {"labels": labels, "length": length, "batch_size": batch_size, "samples": samples}
        return make_batches(tokenizer, examples, self.task, **how)

    def load(self, device: str | None) -> Any:
        """The model, in evaluation mode."""
        from ..calibration.data import auto_class
        from ..saving.pretrained import load_pretrained
        from .devices import choose_device

        chosen = choose_device(device)
        return load_pretrained(auto_class(self.task), self.model, dtype="auto").eval().to(chosen)


@contextmanager
def bar(console: Console, what: str, total: int | None) -> Iterator[Any]:
    """A progress bar; gives the function that moves it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(what, total=total)
        yield lambda done, known=total: progress.update(bar, completed=done, total=known)
