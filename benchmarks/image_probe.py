"""What attention within images costs in quality: linear probes on the features of a vision tower, in pairs with dense.

    python benchmarks/image_probe.py MODEL --train FILE --test FILE --folder docs/results/vision --minutes 60 \
        --output docs/results/vision.md

`MODEL` holds a vision tower such as DINOv2-small. `FILE` is a zip file of images as `split/class/name.jpg`, such as
CIFAR-10 as JPEG. For every form a probe is trained on the same images and kept in `probes.safetensors`; then images are
tested, a step of one image of each class after the other, and the answers appended to `answers.jsonl`: with both files
a later run goes on. `--seconds 0` measures nothing and writes the page. Answers do not depend on how busy the machine
is. Images per second do: `--speed` measures these alone, on an idle one. `--tuned` names the folder of what
`recipes/configs/dinov2_cifar10_*.yaml` have trained.
"""

import datetime
import io
import platform
import statistics
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

import patchattn

sys.path.insert(0, str(Path(__file__).parent))
from paired_rows import append_row, paired, read_rows
from published import DINO, needed

FORMS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "dense": None,
    "window 4": ("window", {"size": 4}),
    "window 8": ("window", {"size": 8}),
    "neighborhood 5": ("neighborhood", {"kernel": 5}),
    "neighborhood 7": ("neighborhood", {"kernel": 7}),
    "neighborhood 9": ("neighborhood", {"kernel": 9}),
    "axial": ("axial", {}),
    "biformer 4": ("biformer", {"regions": 4}),
    "biformer 8": ("biformer", {"regions": 8}),
    "moh 75 %": ("moh", {"active_ratio": 0.75}),
    **{f"prune {share} %": ("prune", {"sparsity": share / 100}) for share in (10, 20, 30, 50)},
}
TUNED = {"dense, tuned": "dinov2_cifar10_dense", "moh 75 %, tuned": "dinov2_cifar10_moh75"}  # and their runs
# What is said, the form it is said of, what it is compared with, and how many points it may lose.
CLAIMS = (
    ("a tenth of the heads can go", "prune 10 %", "dense", 2),
    ("a fifth of the heads can go", "prune 20 %", "dense", 2),
    ("half of the heads can go", "prune 50 %", "dense", 2),
    ("tokens need three quarters of their heads", "moh 75 %", "dense", 2),
    ("so they do after training", "moh 75 %, tuned", "dense, tuned", 2),
    ("a wider neighborhood is better", "neighborhood 9", "neighborhood 5", 0),
    ("a moving window beats a fixed one (49 keys to 64)", "neighborhood 7", "window 8", 0),
    ("chosen regions beat a fixed window (64 keys)", "biformer 4", "window 8", 0),
    ("chosen regions beat a fixed window (16 keys)", "biformer 8", "window 4", 0),
)
SCORED = 4  # steps of training images that the importance of heads is taken from
TIMED = 7  # batches of which the median is told


class Images:
    """Images of a zip file by class, each class in the order of names."""

    def __init__(self, path: Path, processor: Any, pixels: int) -> None:
        self.archive, self.processor = zipfile.ZipFile(path), processor
        self.size = {"height": pixels, "width": pixels}
        self.by_class: dict[str, list[str]] = {}
        for name in sorted(self.archive.namelist()):
            if name.endswith(".jpg"):
                self.by_class.setdefault(name.split("/")[-2], []).append(name)

    def step(self, number: int) -> torch.Tensor:
        """`(classes, 3, pixels, pixels)`: the image of this number of every class."""
        read = [self.archive.read(names[number]) for names in self.by_class.values()]
        images = [Image.open(io.BytesIO(each)).convert("RGB") for each in read]
        made = self.processor(images, size=self.size, do_center_crop=False, return_tensors="pt")
        pixels: torch.Tensor = made["pixel_values"]
        return pixels

    def __len__(self) -> int:
        return min(map(len, self.by_class.values()))


def features(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """`(B, 2 E)` in float32: the class token of the last layer beside the mean of its patches."""
    with torch.inference_mode():
        tokens = model(pixel_values=pixels.to(model.dtype)).last_hidden_state.float()
    return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=-1).clone()


class Forms:
    """A tower in every form there is, those that were trained among them."""

    def __init__(self, tower: Any, importance: Any, runs: Path | None) -> None:
        self.tower, self.importance, self.trained = tower, importance, {}
        for form, name in TUNED.items() if runs is not None else ():
            load = patchattn.from_pretrained if "moh" in form else AutoModelForImageClassification.from_pretrained
            self.trained[form] = load(runs / name, dtype=tower.dtype).eval().base_model

    def __iter__(self) -> Iterator[str]:
        return iter((*FORMS, *self.trained))

    @contextmanager
    def __call__(self, form: str) -> Iterator[Any]:
        """The tower in that form."""
        chosen = FORMS.get(form)
        if chosen is None:
            yield self.trained.get(form, self.tower)
            return
        name, settings = chosen
        given = {**settings, **({"importance": self.importance} if name == "prune" else {})}
        with patchattn.patched(self.tower, name, **given):
            yield self.tower


def probe(train: torch.Tensor, classes: int) -> dict[str, torch.Tensor]:
    """Weights `(classes, 2 E)` and bias of a logistic regression on standardised features of steps, of three classes or
    more."""
    from sklearn.linear_model import LogisticRegression

    mean, scale = train.mean(0), train.std(0).clamp(min=1e-6)
    labels = list(range(classes)) * (len(train) // classes)
    found = LogisticRegression(C=0.01, max_iter=2000).fit(((train - mean) / scale).numpy(), labels)
    weight = (torch.from_numpy(found.coef_).float() / scale).half().contiguous()
    return {"weight": weight, "bias": torch.from_numpy(found.intercept_).float() - weight.float() @ mean}


def answers(features: torch.Tensor, probe: dict[str, torch.Tensor]) -> list[int]:
    """Of each image of a step whether its class is found, as 1 or 0."""
    found = (features @ probe["weight"].float().T + probe["bias"]).argmax(-1)
    return (found == torch.arange(len(features))).int().tolist()


def main(
    model: Annotated[Path, typer.Argument(help="Folder of a vision tower.", default_factory=needed(DINO))],
    train: Annotated[Path, typer.Option(help="Zip file of the images to train probes on.")],
    test: Annotated[Path, typer.Option(help="Zip file of the images to test them on.")],
    folder: Annotated[Path, typer.Option(help="Where probes and answers are kept.")],
    output: Annotated[Path, typer.Option(help="Markdown file to write.")],
    seconds: Annotated[float, typer.Option(help="Begin nothing after so many seconds of this process.")] = 3600.0,
    pixels: Annotated[int, typer.Option(help="Side of the images, which are enlarged to it.")] = 224,
    steps: Annotated[int, typer.Option(help="Training images of every class.")] = 40,
    tuned: Annotated[Path | None, typer.Option(help="Folder of trained runs; without it, none is measured.")] = None,
    speed: Annotated[bool, typer.Option(help="Measure images per second, and nothing else.")] = False,
) -> None:
    """Measure what is not measured yet, and write the page."""
    processor = AutoImageProcessor.from_pretrained(model)
    tower = AutoModel.from_pretrained(model, dtype=torch.bfloat16).eval()
    images = [Images(path, processor, pixels) for path in (train, test)]
    if list(images[0].by_class) != list(images[1].by_class):
        raise ValueError(f"Classes differ: {list(images[0].by_class)} to train on, {list(images[1].by_class)} to test.")
    if seconds > 0 or speed:
        scored = [{"pixel_values": images[0].step(len(images[0]) - 1 - i).to(tower.dtype)} for i in range(SCORED)]
        importance = patchattn.head_importance(tower, scored, "amp")
        forms = Forms(tower, importance, tuned)
        if speed:
            measure_speed(forms, images[1].step(0), folder)
        else:
            measure(forms, images, folder, steps, seconds)
    output.write_text("\n".join(page(folder, model.name, len(images[1].by_class), pixels)), encoding="utf-8")
    print(output.read_text(encoding="utf-8"))


def measure(forms: Forms, images: list[Images], folder: Path, steps: int, seconds: float) -> None:
    """Probes that are not trained yet, then answers that are not given yet."""
    folder.mkdir(parents=True, exist_ok=True)
    file, rows = folder / "probes.safetensors", folder / "answers.jsonl"
    probes = load_file(file) if file.exists() else {}
    left = [form for form in forms if f"{form}.weight" not in probes]
    parts = [images[0].step(number) for number in range(steps)] if left else []
    for form in left:
        if time.process_time() < seconds:
            with forms(form) as tower:
                found = torch.cat([features(tower, part) for part in parts])
            probes |= {f"{form}.{name}": part for name, part in probe(found, len(images[0].by_class)).items()}
            probes["images"] = torch.tensor(len(found))
            save_file(probes, file)
    done = read_rows(rows)
    for number in range(len(images[1])):
        pixels = None
        for form in forms:
            key = f"{form}/{number}"
            if key in done or f"{form}.weight" not in probes:
                continue
            if time.process_time() >= seconds:
                return
            pixels = images[1].step(number) if pixels is None else pixels
            with forms(form) as tower:
                own = features(tower, pixels)
            kept = {name: probes[f"{form}.{name}"] for name in ("weight", "bias")}
            append_row(rows, key, {"right": answers(own, kept)})


def measure_speed(forms: Forms, pixels: torch.Tensor, folder: Path) -> None:
    """Images per second of every form, the median of several batches."""
    for form in forms:
        with forms(form) as tower:
            features(tower, pixels)
            taken = []
            for _ in range(TIMED):
                start = time.perf_counter()
                features(tower, pixels)
                taken.append(time.perf_counter() - start)
        told = {"images_per_second": len(pixels) / statistics.median(taken), "threads": torch.get_num_threads()}
        append_row(folder / "speed.jsonl", form, told)


def page(folder: Path, name: str, classes: int, pixels: int) -> list[str]:
    """The page: of forms that have answers, the steps that all of them have answered."""
    rows, speeds = read_rows(folder / "answers.jsonl"), read_rows(folder / "speed.jsonl")
    every = (*FORMS, *TUNED)
    answered, steps = [form for form in every if f"{form}/0" in rows], 0
    if "dense" not in answered:
        raise ValueError(f"There is no answer of the dense model in {folder}: give it more seconds.")
    while all(f"{form}/{steps}" in rows for form in answered):
        steps += 1
    trained = int(load_file(folder / "probes.safetensors")["images"])
    found = {form: [each for i in range(steps) for each in rows[f"{form}/{i}"]["right"]] for form in answered}
    lines = []
    for form, own in found.items():
        mean, error = paired(own, found["dense"])
        difference = "" if form == "dense" else f"{100 * mean:+.1f} ± {100 * error:.1f}"
        rate = f"{speeds[form]['images_per_second']:.1f}" if form in speeds else "not measured"
        lines.append(f"| {form} | {100 * sum(own) / len(own):.1f} | {difference} | {rate} |")
    missing = [form for form in every if form not in answered]
    threads = ", ".join(map(str, sorted({row["threads"] for row in speeds.values()})))
    return [
        "# Vision",
        "",
        "What is measured elsewhere: [the time of masks of images](grid_cpu.md), [prefills with fewer image "
        "tokens](token_pruning.md), [hallucination on a tiny model](hallucination.md), "
        "[training a ViT](vit_cifar10.md).",
        "",
        "## Attention within images: linear probes",
        "",
        f"{datetime.date.today()}, Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, patchattn {patchattn.__version__}, CPU ({platform.machine()}), bfloat16.",
        "",
        f"`python benchmarks/image_probe.py {name} --train FILE --test FILE --folder docs/results/vision --pixels "
        f"{pixels} ...`: CIFAR-10, {trained} images for training and {steps * classes} for testing, as many of each",
        f"class, enlarged to {pixels} pixels. On the class token of the last layer beside the mean of its patches,",
        "standardised, a logistic regression (scikit-learn, C = 0.01) is trained for every form. The form is patched",
        "into all layers, and nothing else of the model is trained. Heads are taken out by the AMP score of",
        f"{SCORED * classes} further training images, over all layers together. Differences are to dense attention, in",
        "points, of the same images, ± a standard error. Tuned: all of the model was trained before its probe, dense",
        "and MoH alike, as `recipes/configs/dinov2_cifar10_*.yaml` say. This copy of the backbone is from a package",
        "that trained it on: its features tell far less of these classes than is published of DINOv2-small, so compare",
        "rows with each other and not with the literature."
        + (f" Images per second: the median of {TIMED} batches of {classes}, threads: {threads}." if speeds else ""),
        "",
        "| form | accuracy, % | difference | images/s |",
        "|---|---|---|---|",
        *lines,
        "",
        *([f"Not measured yet: {', '.join(missing)}.", ""] if missing else []),
        "### What it shows",
        "",
        "A claim is shown where its difference, and the points that it may lose, are more than two standard errors",
        "above zero. Papers claim most of this of models that were trained so; here only what is called tuned was.",
        "",
        "| said | form | against | difference | may lose | |",
        "|---|---|---|---|---|---|",
        *(claim(found, *each) for each in CLAIMS),
        "",
    ]


def claim(found: dict[str, list[int]], said: str, form: str, other: str, may_lose: int) -> str:
    """A line of the table of claims."""
    if not {form, other} <= found.keys():
        return f"| {said} | {form} | {other} | | {may_lose} | not measured |"
    mean, error = (100 * part for part in paired(found[form], found[other]))
    verdict = "shown" if mean + may_lose > 2 * error else "not shown"
    return f"| {said} | {form} | {other} | {mean:+.1f} ± {error:.1f} | {may_lose} | {verdict} |"


if __name__ == "__main__":
    typer.run(main)
