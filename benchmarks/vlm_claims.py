"""What methods for vision-language models claim, on a small one that was trained on photographs: POPE, CHAIR, in pairs.

    python benchmarks/vlm_claims.py runs/photo_vlm --photos cifar10_test.zip --heads docs/results/heads/heads.json \
        --folder docs/results/photo_vlm --output docs/results/photo_vlm.md

For a model of recipes/train_photo_vlm.py. Pictures are generated from photographs that it was not trained on; every
setting gets the same, in batches of the same, and rows are appended to `answers.jsonl`: a later run goes on. Where the
model looks is in `looks.jsonl`. `--seconds 0` measures nothing and writes the page. No time is measured.
"""

import datetime
import json
import platform
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from PIL import Image
from rich.progress import Progress
from transformers import AutoModelForImageTextToText, AutoProcessor

import patchattn
from patchattn.evaluation.tasks import collages

sys.path.insert(0, str(Path(__file__).parent))
from paired_rows import append_row, read_rows
from vlm_parts.asking import PICTURES_SEED, answers, looks
from vlm_parts.page import carve_line, looking_table, tables, whole
from vlm_parts.settings import BLIND, HEADS, SETTINGS, as_set

REFUSED = "refused"  # key of a row that tells why a setting was not measured


def main(
    model: Annotated[Path, typer.Argument(help="Folder of a model of recipes/train_photo_vlm.py.")],
    photos: Annotated[Path, typer.Option(help="Zip file of photographs that it was not trained on.")],
    heads: Annotated[Path, typer.Option(help="JSON file of retrieval heads, the strongest first, for DeCoRe.")],
    folder: Annotated[Path, typer.Option(help="Where rows are kept.")],
    output: Annotated[Path, typer.Option(help="Markdown file to write.")],
    seconds: Annotated[float, typer.Option(help="Begin nothing after so many seconds of this process.")] = 1800.0,
    looking: Annotated[
        float, typer.Option(help="Seconds, of those of this process, for where the model looks, at most.")
    ] = 300.0,
    batch: Annotated[int, typer.Option(help="Pictures of a batch; the rows of a folder are of one size.", min=1)] = 8,
    pictures: Annotated[int, typer.Option(help="Pictures at most; the last batch is whole.", min=1)] = 400,
    only: Annotated[list[str] | None, typer.Option(help="A setting to measure; all without.")] = None,
) -> None:
    """Measure what is not measured yet, and write the page."""
    if unknown := set(only or ()) - SETTINGS.keys():
        raise typer.BadParameter(f"No setting is called {sorted(unknown)}; there are {list(SETTINGS)}.")
    known = collages.Photos(photos)
    if seconds > 0:
        claim(model, folder)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        loaded = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.bfloat16).eval()
        processor = AutoProcessor.from_pretrained(model)
        measure(loaded, processor, known, heads, folder, seconds - looking, batch, only or list(SETTINGS), pictures)
        look(loaded, processor, known, folder, seconds, pictures)
    output.write_text("\n".join(page(folder, known)), encoding="utf-8")
    print(output.read_text(encoding="utf-8"))


def claim(model: Path, folder: Path) -> None:
    """Keep how the model was trained beside its rows; ValueError if there are those of another training."""
    metrics, kept = (model / "metrics.json").read_text(encoding="utf-8"), folder / "training.json"
    if kept.is_file() and kept.read_text(encoding="utf-8") != metrics:
        raise ValueError(f"{folder} holds rows of another training than that of {model}: choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    kept.write_text(metrics, encoding="utf-8")


def shown(scene: collages.Scene, processor: Any, setting: str) -> Any:
    """The picture that a setting gets."""
    side = processor.image_processor.size["height"]
    return Image.new("RGB", (side, side), (110, 110, 110)) if setting == BLIND else scene.picture(side)


def measure(
    model: Any,
    processor: Any,
    photos: collages.Photos,
    heads: Path,
    folder: Path,
    seconds: float,
    batch: int,
    settings: list[str],
    most: int,
) -> None:
    """Batch after batch, all settings of each, until the time is up."""
    file, start = folder / "answers.jsonl", 0
    done = read_rows(file)
    with Progress(disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("Processor time", total=seconds)
        while start < most:
            scenes = [photos.scene(PICTURES_SEED, start + i) for i in range(batch)]
            for setting in settings:
                if f"{setting}/{start}" in done or f"{setting}/{REFUSED}" in done:
                    continue
                progress.update(task, completed=time.process_time(), description=setting)
                if time.process_time() >= seconds:
                    return
                pictures = [shown(scene, processor, setting) for scene in scenes]
                try:
                    with as_set(model, setting, heads):
                        rows = answers(model, processor, scenes, pictures)
                except (ValueError, NotImplementedError) as error:
                    if start:
                        raise
                    append_row(file, f"{setting}/{REFUSED}", {"why": str(error)})
                    done = read_rows(file)
                    continue
                for index, row in enumerate(rows, start):
                    append_row(file, f"{setting}/{index}", row)
            start += batch


def look(model: Any, processor: Any, photos: collages.Photos, folder: Path, seconds: float, most: int) -> None:
    """Pictures of two objects or more, one after the other."""
    file, index = folder / "looks.jsonl", 0
    done = read_rows(file)
    while index < most and time.process_time() < seconds:
        scene = photos.scene(PICTURES_SEED, index)
        if len(scene.objects) > 1 and str(index) not in done:
            append_row(file, str(index), looks(model, processor, scene, shown(scene, processor, "dense")))
        index += 1


def page(folder: Path, photos: collages.Photos) -> list[str]:
    """The page: of settings that have answers, the pictures that all of them have answered."""
    rows, looked = read_rows(folder / "answers.jsonl"), list(read_rows(folder / "looks.jsonl").values())
    answered, count = [name for name in SETTINGS if f"{name}/0" in rows], 0
    if "dense" not in answered:
        raise ValueError(f"There is no answer of the dense model in {folder}: give it more seconds.")
    while all(f"{name}/{count}" in rows for name in answered):
        count += 1
    scenes = [photos.scene(PICTURES_SEED, index) for index in range(count)]
    refused = {name: rows[f"{name}/{REFUSED}"]["why"] for name in SETTINGS if f"{name}/{REFUSED}" in rows}
    missing = [name for name in SETTINGS if name not in answered and name not in refused]
    trained = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    return [
        "# Claims on a small vision-language model",
        "",
        f"{datetime.date.today()}, Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, patchattn {patchattn.__version__}, CPU ({platform.machine()}), bfloat16.",
        "",
        "A LLaVA of DINOv2-small and SmolLM2-135M-Instruct, made by `python recipes/train_photo_vlm.py "
        "recipes/configs/photo_vlm.yaml`:",
        f"{whole(trained)}",
        "Its weights are not committed; the recipe makes them again.",
        "",
        "`python benchmarks/vlm_claims.py runs/photo_vlm --photos FILE --heads docs/results/heads/heads.json --folder "
        "docs/results/photo_vlm --output docs/results/photo_vlm.md`:",
        f"{count} pictures, each of one to four photographs of CIFAR-10's test images in its quarters. Of each picture",
        "one class that is there is asked after, and one that is not of each of POPE's kinds, which are three sets",
        "that share what is answered by yes; and a caption is asked for. Greedy; settings are the methods' own",
        f"defaults, or told by their names; DAMRO keeps 4 tokens of 64, DeCoRe masks the first {HEADS} of the text",
        "model's retrieval heads. Differences are to dense attention, of the same pictures, ± a standard error.",
        "",
        "POPE: accuracy, and F1 in brackets, in percent; answers lost and won against dense, of "
        f"{4 * count}. `{BLIND}`: what the plain model says of a picture that shows nothing. CHAIR: invented are "
        "mentions of what is not",
        "there, a caption.",
        "",
        *tables(rows, scenes, photos),
        "",
        *([f"Refused: {'; '.join(f'{name}: {why}' for name, why in refused.items())}", ""] if refused else []),
        *([f"Not measured yet: {', '.join(missing)}.", ""] if missing else []),
        "A claim is shown where its difference, and the points that it may lose, are more than two standard errors",
        "above zero; captions that invent less by saying less are told apart by F1. VAR moves what sinks among the",
        "image's tokens receive: where a model has none there, its answers are dense's. A-VL drops keys behind the",
        "prompt, so that answers of one token are dense's.",
        "",
        "## Where it looks",
        "",
        *(
            [
                f"Of {len(looked)} pictures of two objects or more: the share of a map in the quarter of an object, "
                "when it is asked after,",
                "and when the other object is.",
                "",
                *looking_table(looked),
                "",
                carve_line(looked),
                "",
            ]
            if looked
            else ["Not measured yet.", ""]
        ),
    ]


if __name__ == "__main__":
    typer.run(main)
