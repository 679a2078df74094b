"""Train an image classifier under variants: a pretrained one, with LoRA or in full, or a small ViT from scratch.

    accelerate launch recipes/finetune_image_classification.py recipes/configs/vit_cifar10_moh.yaml

The configuration and the folders are checked before a model is made. Paths in the configuration are relative to where
the recipe is started.
"""

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from recipe_common import PatchedTrainer, TrainingSettings, begin, command, finished, prepare, train
from torch.utils.data import Dataset
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from patchattn import Settings, option

IN_MEMORY = 2**31  # bytes up to which the images of a split are decoded once and kept


@dataclass(frozen=True, kw_only=True)
class SmallViT(Settings):
    """The ViT that `from_scratch` describes, by the names of transformers' ViTConfig; dropout is off."""

    image_size: int = option(32, help="Side of the images, which are resized to it.", unit="pixels", minimum=1)
    patch_size: int = option(4, help="Side of a patch, which is one token.", unit="pixels", minimum=1)
    hidden_size: int = option(128, help="Width of a token.", minimum=1)
    num_hidden_layers: int = option(6, help="Layers.", minimum=1)
    num_attention_heads: int = option(8, help="Query heads per layer.", minimum=1)
    intermediate_size: int = option(512, help="Width inside the MLPs.", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for whole, part in (("image_size", "patch_size"), ("hidden_size", "num_attention_heads")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"from_scratch: {whole} ({getattr(self, whole)}) must be a multiple of {part} "
                    f"({getattr(self, part)})."
                )


@dataclass(frozen=True, kw_only=True)
class ImageSettings(TrainingSettings):
    """Train an image classifier under variants."""

    data: str | tuple[str, ...] = option(
        help="Folder or zip file, or several, with images in train/<class>/ and in a folder of the same classes to "
        "evaluate on."
    )
    eval_split: str = option("test", help="Name of that other folder, such as test or validation.")
    model: str | None = option(None, help="Folder or Hub id of an image classifier to fine-tune.")
    from_scratch: dict[str, Any] = option(
        {},
        parse=lambda given: SmallViT.from_dict(given).to_dict() if given else given,
        help="Instead of model: the fields of a ViT to train from scratch; see SmallViT.",
    )
    crop_padding: int = option(
        4, help="Training images are shifted at random by up to this much, zeros moving in.", unit="pixels", minimum=0
    )
    flip: bool = option(True, help="Mirror every second training image, chosen at random, from left to right.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.model is None) != bool(self.from_scratch):
            raise ValueError("Give either model, to fine-tune it, or from_scratch, with the fields of a new ViT.")
        if self.from_scratch and self.lora_rank:
            raise ValueError("lora_rank goes with a pretrained model; a ViT from scratch is trained in full.")
        if self.eval_split == "train":
            raise ValueError("eval_split must not be train: accuracy is that on images the model was not trained on.")
        trained, evaluated = (set(list_images(self.data, split)) for split in ("train", self.eval_split))
        if trained != evaluated:
            raise ValueError(
                f"train and {self.eval_split} must hold the same classes; only one of them holds "
                f"{', '.join(sorted(trained ^ evaluated))}."
            )


AnyPath = Path | zipfile.Path


def list_images(data: str | Sequence[str], split: str) -> dict[str, list[AnyPath]]:
    """The files of each class of a split, both sorted by name; hidden files are passed over.

    Raises:
        ValueError: a missing folder or file, a split without classes, a class without files, or a folder inside one.
    """
    roots = [_root(place) for place in ([data] if isinstance(data, str) else data)]
    if not (folders := [root / split for root in roots if (root / split).is_dir()]):
        found = sorted({folder.name for root in roots for folder in root.iterdir() if folder.is_dir()})
        raise ValueError(f"{data} holds no folder {split!r}, only: {', '.join(found) or 'none'}.")
    classes: dict[str, list[AnyPath]] = {}
    for folder in folders:
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.name.startswith("."):
                classes.setdefault(entry.name, []).extend(f for f in entry.iterdir() if not f.name.startswith("."))
    if not classes:
        raise ValueError(f"{folders[0]} holds no folders; there must be one per class, with its images.")
    for name, files in classes.items():
        if not files:
            raise ValueError(f"The class {name!r} of {split} has no images in {data}.")
        if inner := next((file for file in files if file.is_dir()), None):
            raise ValueError(f"{inner} is a folder; images must lie directly in the folder of their class.")
    return {name: sorted(classes[name], key=lambda file: file.name) for name in sorted(classes)}


def _root(place: str) -> AnyPath:
    if Path(place).is_dir():
        return Path(place)
    if not zipfile.is_zipfile(place):
        raise ValueError(f"data: {place!r} is neither a folder nor a zip file.")
    return zipfile.Path(place)


class Images(Dataset[dict[str, torch.Tensor]]):
    """The images of a split as the model gets them.

    With augmentation, an image is shifted and mirrored by draws that depend on the seed, the epoch and its index alone,
    so that a resumed run and one on several processes see what an uninterrupted run on one process sees.

    Args:
        classes: files by class; labels are counted in the order of its keys.
        processor: of the model.
        crop_padding: see `ImageSettings`.
        flip: see `ImageSettings`.
        seed: of the augmentation.

    Raises:
        ValueError: a file is not a readable image. Found at once where the split fits into `IN_MEMORY`; elsewhere
            images are decoded when they are needed.
    """

    def __init__(
        self,
        classes: dict[str, list[AnyPath]],
        processor: Any,
        *,
        crop_padding: int = 0,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        self.files = [file for files in classes.values() for file in files]
        self.labels = [label for label, files in enumerate(classes.values()) for _ in files]
        self.processor = processor
        self.crop_padding, self.flip, self.seed = crop_padding, flip, seed
        fits = self._decode(0).numel() * len(self) <= IN_MEMORY
        self.kept = torch.stack([self._decode(index) for index in range(len(self))]) if fits else None
        self.start_epoch(0)

    def __len__(self) -> int:
        return len(self.files)

    def start_epoch(self, epoch: int) -> None:
        """Draw the shifts and flips of an epoch."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
        self.corners = torch.randint(2 * self.crop_padding + 1, (len(self), 2), generator=generator)
        self.mirrored = torch.rand(len(self), generator=generator) < (0.5 if self.flip else 0.0)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`pixel_values` `(3, height, width)`, rescaled and normalised, and `labels`, a scalar."""
        pixels = self._decode(index) if self.kept is None else self.kept[index]
        if margin := self.crop_padding:
            height, width = pixels.shape[1:]
            top, left = self.corners[index].tolist()
            padded = torch.nn.functional.pad(pixels, (margin,) * 4)
            pixels = padded[:, top : top + height, left : left + width]
        if self.mirrored[index]:
            pixels = pixels.flip(-1)
        return {"pixel_values": self._normalise(pixels), "labels": torch.tensor(self.labels[index])}

    def _decode(self, index: int) -> torch.Tensor:
        """`(3, height, width)` in uint8, of the size that the model takes."""
        file = self.files[index]
        try:
            with Image.open(io.BytesIO(file.read_bytes())) as image:
                rgb = image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # all of which Pillow raises
            raise ValueError(f"{file} is not a readable image: {error}") from error
        pixels = self.processor(rgb, do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values[0]
        if pixels.dtype != torch.uint8:
            name = type(self.processor).__name__
            raise NotImplementedError(f"{name} cannot leave out its rescaling; use a model with another processor.")
        return pixels

    def _normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        given = self.processor
        values = pixels * given.rescale_factor if given.do_rescale else pixels.float()
        if not given.do_normalize:
            return values
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (given.image_mean, given.image_std))
        return (values - mean) / std


class EpochOfImages(TrainerCallback):
    """Tells the training images which epoch it is. The data loaders of several processes do not."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.images.start_epoch(int(state.epoch or 0))


def make_processor(settings: ImageSettings) -> Any:
    """What resizes and normalises the images for the model."""
    if not settings.from_scratch:
        return AutoImageProcessor.from_pretrained(settings.model)
    side = settings.from_scratch["image_size"]
    return ViTImageProcessorPil(size={"height": side, "width": side})


def make_model(settings: ImageSettings, classes: list[str]) -> Any:
    """The model, unpatched, with a head for these classes."""
    labels = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    if settings.from_scratch:
        return ViTForImageClassification(ViTConfig(**settings.from_scratch, **labels))
    model = AutoModelForImageClassification.from_pretrained(settings.model, ignore_mismatched_sizes=True, **labels)
    if settings.lora_rank and not hasattr(model, "classifier"):
        raise NotImplementedError(f"{type(model).__name__} has no head named classifier; set lora_rank to 0.")
    return model


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the images whose class is the predicted one."""
    return {"accuracy": float(np.mean(prediction.predictions == prediction.label_ids))}


def run(settings: ImageSettings) -> dict[str, Any]:
    """Train and evaluate, or continue a run that was interrupted; returns what `metrics.json` holds."""
    if (done := finished(settings)) is not None:
        return done
    classes = list_images(settings.data, "train")
    processor = make_processor(settings)
    training = Images(classes, processor, crop_padding=settings.crop_padding, flip=settings.flip, seed=settings.seed)
    evaluation = Images(list_images(settings.data, settings.eval_split), processor)
    arguments = begin(settings)
    model = prepare(make_model(settings, list(classes)), settings, heads=["classifier"])
    trainer = PatchedTrainer.of(
        model,
        settings,
        arguments,
        mean_loss=True,
        train_dataset=training,
        eval_dataset=evaluation,
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        callbacks=[EpochOfImages(training)],
        processing_class=processor,  # saved with the model
    )
    return train(trainer, settings, classes=list(classes), train_images=len(training), eval_images=len(evaluation))


if __name__ == "__main__":
    command(ImageSettings, run)
