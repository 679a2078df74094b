"""Object hallucination of a vision-language model, plain and under a variant: POPE and CHAIR, greedy and sampled.

On generated pictures of coloured shapes, for the model that recipes/train_tiny_vlm.py trains:

    python benchmarks/hallucination.py runs/tiny_vlm --output runs/hallucination --variant damro --set alpha=0.5

On the official files, for a LLaVA or any other image-text-to-text model, from a folder or the Hub:

    python benchmarks/hallucination.py llava-hf/llava-1.5-7b-hf --output runs/llava --images val2014 \\
        --pope coco_pope_random.json --pope coco_pope_popular.json --pope coco_pope_adversarial.json \\
        --objects imid_to_objects.json --synonyms synonyms.txt --variant damro

The plain model is always measured beside the variant. Answers are kept in the output folder and not asked for again;
`results.json` and `results.md` there hold all that were measured into it. A killed run continues.
"""

import datetime
import json
import platform
import statistics
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor

import patchattn
from patchattn.evaluation.metrics.pope import says_no
from patchattn.evaluation.tasks import shapes
from patchattn.evaluation.tasks.chair import read_objects, run_chair
from patchattn.evaluation.tasks.pope import PopeQuestion, read_pope, run_pope

PICTURES_SEED = 2_000_003  # no seed that the recipe trains on
WORDS = "Please answer this question with one word."  # after POPE's questions, for models that talk


@dataclass(frozen=True)
class Tasks:
    """What is asked.

    Attributes:
        pope: name of a set to its questions.
        objects: name of an image to its objects; its captions are asked for.
        synonyms: file.
        images: folder.
        suffix: after a question.
        prompt: for a caption.
    """

    pope: dict[str, list[PopeQuestion]]
    objects: dict[str, list[str]]
    synonyms: Path
    images: Path
    suffix: str
    prompt: str


def generated_tasks(folder: Path, count: int) -> Tasks:
    """Pictures of shapes, written into a folder; two questions of each of POPE's kinds after each."""
    folder.mkdir(parents=True, exist_ok=True)
    scenes = {f"{index:05}.png": scene for index, scene in enumerate(shapes.scenes(PICTURES_SEED, count))}
    for name, scene in scenes.items():
        scene.picture().save(folder / name)
    (folder / "synonyms.txt").write_text(shapes.synonym_table(), encoding="utf-8")
    pope = {}
    for kind in shapes.KINDS:
        asked = [
            (name, shapes.question(thing), label)
            for name, scene in scenes.items()
            for thing, label in ((scene.present(), "yes"), (scene.absent(kind), "no"))
        ]
        pope[kind] = [PopeQuestion(number, *rest) for number, rest in enumerate(asked, 1)]
    objects = {name: list(scene.objects) for name, scene in scenes.items()}
    return Tasks(pope, objects, folder / "synonyms.txt", folder, "", shapes.CAPTION_REQUEST)


def official_tasks(pope: list[Path], objects: Path | None, synonyms: Path | None, images: Path | None) -> Tasks:
    """POPE's files, and captions of the images that the first of them asks about."""
    if images is None or synonyms is None or objects is None:
        raise ValueError("--pope needs --images, --objects and --synonyms too.")
    sets = {path.stem: read_pope(path) for path in pope}
    known = read_objects(objects)
    first = dict.fromkeys(question.image for question in next(iter(sets.values())))
    if unknown := [name for name in first if name not in known]:
        raise ValueError(f"{objects} knows {len(unknown)} of the images not, such as {unknown[0]}.")
    named = {name: known[name] for name in first}
    return Tasks(sets, named, synonyms, images, WORDS, "Generate a short caption of this image.")


def measure(model: Any, processor: Any, tasks: Tasks, folder: Path, **generation: Any) -> dict[str, dict[str, float]]:
    """The scores of each set of questions, and CHAIR's."""
    scores = {
        name: run_pope(
            model, processor, asked, tasks.images, folder / f"{name}.jsonl", suffix=tasks.suffix, **generation
        )
        for name, asked in tasks.pope.items()
    }
    captions = {"prompt": tasks.prompt, **generation}
    return scores | {
        "chair": run_chair(
            model, processor, tasks.objects, tasks.images, tasks.synonyms, folder / "captions.jsonl", **captions
        )
    }


def changed_answers(before: Path, after: Path) -> dict[str, int]:
    """Answers to POPE's questions that were right and are wrong (lost), and the reverse (won)."""
    was, now = ([_is_right(json.loads(line)) for line in path.open(encoding="utf-8")] for path in (before, after))
    pairs = list(zip(was, now, strict=True))
    return {"lost": pairs.count((True, False)), "won": pairs.count((False, True))}


def _is_right(row: dict[str, str]) -> bool:
    return says_no(row["answer"]) == (row["label"] == "no")


def spelled(variant: str | None, settings: Mapping[str, Any], modules: str | None) -> str:
    """A row's name."""
    values = ", ".join(f"{key}={value}" for key, value in settings.items())
    values += f" on {modules}" if modules else ""
    return "plain" if variant is None else f"{variant} ({values})" if values else variant


def table(results: dict[str, Any]) -> str:
    """All rows in Markdown: mean, and the standard deviation over the seeds where there are several."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in results["rows"].values():
        rows.setdefault((row["model"], row["decoding"]), []).append(row["scores"])
    heads = "model | decoding | set | accuracy | precision | recall | F1 | yes ratio | neither | lost | won"
    lines = [f"| {heads} |", "|---" * 11 + "|"]
    shown = ("accuracy", "precision", "recall", "f1", "yes_ratio", "neither_ratio")
    for (model, decoding), runs in rows.items():
        for name in [name for name in runs[0] if name != "chair"]:
            cells = [_cell([100 * run[name][key] for run in runs]) for key in shown]
            cells += [_cell([run[name][key] for run in runs], 0) if "lost" in runs[0][name] else "" for key in _CHANGED]
            lines.append(f"| {model} | {decoding} | {name} | {' | '.join(cells)} |")
    lines += ["", "| model | decoding | CHAIR_S | CHAIR_I | recall | words | mentions |", "|---" * 7 + "|"]
    for (model, decoding), runs in rows.items():
        shares = [_cell([100 * run["chair"][key] for run in runs]) for key in ("chair_s", "chair_i", "recall")]
        counts = [_cell([run["chair"][key] for run in runs], 2) for key in ("mean_length", "mentions_per_caption")]
        lines.append(f"| {model} | {decoding} | {' | '.join(shares + counts)} |")
    return "\n".join(lines) + "\n"


_CHANGED = ("lost", "won")  # answers, right and wrong, against those of the plain model under the same decoding


def _cell(values: list[float], digits: int = 1) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _settings(pairs: list[str]) -> dict[str, Any]:
    for pair in pairs:
        if "=" not in pair:
            raise ValueError(f"--set expects name=value, such as alpha=0.5, got {pair!r}.")
    return {name: yaml.safe_load(value) for name, _, value in (pair.partition("=") for pair in pairs)}


def main(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of an image-text-to-text model.")],
    output: Annotated[Path, typer.Option(help="Folder for answers and results.")],
    variant: Annotated[str | None, typer.Option(help="Variant to measure beside the plain model.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the variant, such as alpha=0.5.")
    ] = None,
    modules: Annotated[str | None, typer.Option(help="Modules it goes on: a regular expression.")] = None,
    seeds: Annotated[int, typer.Option(help="Samplings at temperature 1; 0: greedy alone.", min=0)] = 3,
    pictures: Annotated[int, typer.Option(help="Generated pictures.", min=1)] = 250,
    pope: Annotated[list[Path] | None, typer.Option(help="Official question files, instead of pictures.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder with the images of those files.")] = None,
    objects: Annotated[Path | None, typer.Option(help="JSON file: COCO image id to objects.")] = None,
    synonyms: Annotated[Path | None, typer.Option(help="CHAIR's synonym table.")] = None,
    batch: Annotated[int, typer.Option(help="Prompts per call of generate.", min=1)] = 50,
    device: Annotated[str, typer.Option(help="Where the model runs.")] = "cpu",
) -> None:
    """Measure and print the tables."""
    try:
        given = _settings(settings or [])
        if variant is None and (given or modules):
            raise ValueError("--set and --modules go with --variant.")
        if variant is not None:
            patchattn.variant_info(variant).configure(given)
        official = official_tasks(pope, objects, synonyms, images) if pope else None
        tasks = official or generated_tasks(output / "pictures", pictures)
        results = run(model, tasks, output, variant, given, modules, seeds=seeds, batch=batch, device=device)
    except (TypeError, ValueError, NotImplementedError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(table(results))


def run(
    name: str,
    tasks: Tasks,
    output: Path,
    variant: str | None,
    settings: dict[str, Any],
    modules: str | None,
    *,
    seeds: int,
    batch: int,
    device: str,
) -> dict[str, Any]:
    """Measure into the output folder; returns what its `results.json` then holds."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto").to(device).eval()
    processor = AutoProcessor.from_pretrained(name)
    file = output / "results.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else {}
    decodings: list[dict[str, Any]] = [{}, *({"do_sample": True, "seed": seed} for seed in range(seeds))]
    for patch in dict.fromkeys((None, variant)):
        label = spelled(patch, settings, modules)
        how = nullcontext() if patch is None else patchattn.patched(model, patch, settings, modules=modules)
        with how:
            for decoding in decodings:
                kind = "sampling" if decoding else "greedy"
                key = f"{label}, {kind}{decoding.get('seed', '')}"
                folder = output / "answers" / key.replace("/", "_")
                scores = measure(model, processor, tasks, folder, batch=batch, **decoding)
                plain = output / "answers" / f"plain, {kind}{decoding.get('seed', '')}"
                for asked in tasks.pope if patch is not None else ():
                    scores[asked] |= changed_answers(plain / f"{asked}.jsonl", folder / f"{asked}.jsonl")
                rows[key] = {"model": label, "decoding": kind, **decoding, "scores": scores}
    results = {
        "model": name,
        "date": str(datetime.date.today()),
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (patchattn, torch, transformers)},
        },
        "rows": rows,
    }
    file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (output / "results.md").write_text(table(results), encoding="utf-8")
    return results


if __name__ == "__main__":
    typer.run(main)
