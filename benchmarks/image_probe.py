"""What attention within images costs in quality: linear probes on the features of a vision tower, in pairs with dense.

    python benchmarks/image_probe.py MODEL --train FILE --test FILE --folder runs/image_probe --minutes 60 \
        --output docs/results/vision.md

`MODEL` holds a vision tower such as DINOv2-small. `FILE` is a zip file of images as `split/class/name.jpg`, such as
CIFAR-10 as JPEG. Features of a step's images, one of each class for training and one for testing, are stored for
every form before the next step, so that a run goes on where it was stopped and all forms have as many; with
`--minutes 0` the page of what there is is written. Figures are of quality alone, so a busy machine does not matter.
"""

import datetime
import io
import platform
import sys
import time
import zipfile
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel

import patchattn

sys.path.insert(0, str(Path(__file__).parent))
from paired_rows import paired

FORMS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "dense": None,
    "window 4": ("window", {"size": 4}),
    "window 8": ("window", {"size": 8}),
    "neighborhood 5": ("neighborhood", {"kernel": 5}),
    "neighborhood 7": ("neighborhood", {"kernel": 7}),
    "neighborhood 9": ("neighborhood", {"kernel": 9}),
    "axial": ("axial", {}),
}
SPLITS = ("train", "test")


class Images:
    """Images of a zip file by class, each class in the order of names."""

    def __init__(self, path: Path) -> None:
        self.archive = zipfile.ZipFile(path)
        self.by_class: dict[str, list[str]] = {}
        for name in sorted(self.archive.namelist()):
            if name.endswith(".jpg"):
                self.by_class.setdefault(name.split("/")[-2], []).append(name)

    def step(self, number: int) -> list[Image.Image]:
        """The image of this number of every class."""
        names = [names[number] for names in self.by_class.values()]
        return [Image.open(io.BytesIO(self.archive.read(name))).convert("RGB") for name in names]

    def __len__(self) -> int:
        return min(map(len, self.by_class.values()))


def features(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """`(B, 2 E)`: the class token of the last layer beside the mean of its patches."""
    with torch.inference_mode():
        tokens = model(pixel_values=pixels).last_hidden_state
    return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=-1).clone()


def stored(folder: Path, form: str, steps: int) -> dict[str, torch.Tensor]:
    """Features of each split, step after step, classes in their order."""
    parts = [load_file(file_of(folder, form, step)) for step in range(steps)]
    return {split: torch.cat([part[split] for part in parts]) for split in SPLITS}


def file_of(folder: Path, form: str, step: int) -> Path:
    return folder / f"{form.replace(' ', '_').replace(',', '')}-{step:04d}.safetensors"


def right(train: torch.Tensor, test: torch.Tensor, classes: int) -> list[float]:
    """Of each test image whether a linear probe on the training images knows its class, as 1 or 0."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    labels = [list(range(classes)) * (len(part) // classes) for part in (train, test)]
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000)).fit(train.numpy(), labels[0])
    return [float(found == label) for found, label in zip(probe.predict(test.numpy()), labels[1], strict=True)]


def main(
    model: Annotated[Path, typer.Argument(help="Folder of a vision tower.")],
    train: Annotated[Path, typer.Option(help="Zip file of the images to train probes on.")],
    test: Annotated[Path, typer.Option(help="Zip file of the images to test them on.")],
    folder: Annotated[Path, typer.Option(help="Where features are kept.")],
    output: Annotated[Path, typer.Option(help="Markdown file to write.")],
    minutes: Annotated[float, typer.Option(help="Begin no step after so many.")] = 60.0,
    pixels: Annotated[int, typer.Option(help="Side of the images, which are enlarged to it.")] = 224,
) -> None:
    """Measure what is not measured yet, and write the page."""
    folder.mkdir(parents=True, exist_ok=True)
    images = {split: Images(path) for split, path in zip(SPLITS, (train, test), strict=True)}
    measure(model, images, folder, minutes, pixels)
    steps = 0
    while all(file_of(folder, form, steps).exists() for form in FORMS):
        steps += 1
    if steps == 0:
        raise ValueError("Nothing is measured yet: give it more minutes.")
    classes = len(images["test"].by_class)
    found = {}
    for form in FORMS:
        parts = stored(folder, form, steps)
        found[form] = right(parts["train"], parts["test"], classes)
    output.write_text("\n".join(page(model, found, steps * classes, pixels)), encoding="utf-8")
    print(output.read_text(encoding="utf-8"))


def measure(model: Path, images: dict[str, Images], folder: Path, minutes: float, pixels: int) -> None:
    """Features of steps that are not stored yet."""
    end, size = time.time() + 60 * minutes, {"height": pixels, "width": pixels}
    processor, dense = AutoImageProcessor.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    for step in range(min(map(len, images.values()))):
        left = [form for form in FORMS if not file_of(folder, form, step).exists()]
        if left and time.time() >= end:
            return
        for form in left:
            chosen = FORMS[form]
            parts = {}
            for split in SPLITS:
                read = processor(images[split].step(step), size=size, do_center_crop=False, return_tensors="pt")
                if chosen is None:
                    parts[split] = features(dense, read["pixel_values"])
                    continue
                with patchattn.patched(dense, chosen[0], **chosen[1]):
                    parts[split] = features(dense, read["pixel_values"])
            save_file(parts, file_of(folder, form, step))


def page(model: Path, found: dict[str, list[float]], count: int, pixels: int) -> list[str]:
    """The page, whatever there is to say of it left out."""
    lines = []
    for form, own in found.items():
        mean, error = paired(own, found["dense"])
        difference = "" if form == "dense" else f"{100 * mean:+.1f} ± {100 * error:.1f}"
        lines.append(f"| {form} | {100 * sum(own) / len(own):.1f} | {difference} |")
    return [
        "# Attention within images: linear probes",
        "",
        f"{datetime.date.today()}, Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, patchattn {patchattn.__version__}.",
        "",
        f"`python benchmarks/image_probe.py {model.name} --train FILE --test FILE --pixels {pixels} ...`: CIFAR-10,",
        f"{count} images for training and {count} for testing, as many of each class, enlarged to {pixels} pixels. On",
        "the class token of the last layer beside the mean of its patches, standardised, a logistic regression",
        "(scikit-learn, C = 0.01) is trained for every form. The form is patched into all layers, and nothing else of",
        "the model is trained. Differences are to dense attention, in points, of the same images, ± a standard error.",
        "",
        "| form | accuracy, % | difference |",
        "|---|---|---|",
        *lines,
        "",
    ]


if __name__ == "__main__":
    typer.run(main)
