"""The page of claims: POPE and CHAIR of every setting beside dense, in pairs, and which claims are shown."""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paired_rows import Row, paired

from patchattn.evaluation.metrics.chair import SynonymTable, split_words
from patchattn.evaluation.metrics.pope import pope_scores
from patchattn.evaluation.tasks import collages
from patchattn.evaluation.tasks.company import KINDS
from vlm_parts.settings import BLIND, SETTINGS

Measure = Callable[[Row, collages.Scene], float]
# What is said, the setting it is said of, what it is compared with, the measure, its sign, and what it may lose.
CLAIMS = (
    ("PAI: captions invent less", "pai", "dense", "invented", -1, 0.0),
    ("PAI: more answers are right", "pai", "dense", "accuracy", 1, 0.0),
    ("the boost of PAI, without guidance: captions invent less", "pai, boost alone", "dense", "invented", -1, 0.0),
    ("PAINT: captions invent less", "paint", "dense", "invented", -1, 0.0),
    ("PAINT: less than PAI's boost does", "paint", "pai, boost alone", "invented", -1, 0.0),
    ("VHR: captions invent less", "vhr", "dense", "invented", -1, 0.0),
    ("VHR: more answers are right", "vhr", "dense", "accuracy", 1, 0.0),
    ("VCD: more answers are right", "vcd", "dense", "accuracy", 1, 0.0),
    ("VCD: captions invent less", "vcd", "dense", "invented", -1, 0.0),
    ("DAMRO: more answers are right", "damro 2", "dense", "accuracy", 1, 0.0),
    ("DAMRO: captions invent less", "damro 0.5", "dense", "invented", -1, 0.0),
    ("VAR: more answers are right", "var", "dense", "accuracy", 1, 0.0),
    ("VAR: captions invent less", "var", "dense", "invented", -1, 0.0),
    ("DeCoRe: more answers are right", "decore", "dense", "accuracy", 1, 0.0),
    ("DeCoRe: captions invent less", "decore", "dense", "invented", -1, 0.0),
    ("RBD, reconstructed: captions invent less", "rbd_like", "dense", "invented", -1, 0.0),
    ("RBD, reconstructed: better than VCD", "rbd_like", "vcd", "accuracy", 1, 0.0),
    ("FastV: half of the image tokens can go", "fastv 50 %", "dense", "accuracy", 1, 0.02),
    ("FastV: three quarters can go", "fastv 75 %", "dense", "accuracy", 1, 0.02),
    ("FastV: its half is better than any half", "fastv 50 %", "random half from layer 2", "accuracy", 1, 0.0),
    ("HiPrune: a third of the image tokens is enough", "hiprune 1/3", "dense", "accuracy", 1, 0.02),
    ("HiPrune: its third is better than any third", "hiprune 1/3", "random third", "accuracy", 1, 0.0),
    ("A-VL: captions need half of the keys", "a_vl", "dense", "f1", 1, 0.02),
    ("EE-MLLM, untrained: image tokens need not read each other", "ee_mllm", "dense", "accuracy", 1, 0.02),
)


def is_right(row: Row) -> list[bool]:
    """Of the four questions of a picture, the first of which is answered by yes: which are answered right."""
    return [said == wanted for said, wanted in zip(row["said"], "YNNN", strict=True)]


def accuracy(row: Row, scene: collages.Scene) -> float:
    """The mean over POPE's three sets of the two questions of this picture in each."""
    yes, *no = is_right(row)
    return statistics.mean((yes + each) / 2 for each in no)


class Captions:
    """What captions name, by CHAIR's rules."""

    def __init__(self, photos: collages.Photos) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "synonyms.txt"
            path.write_text(collages.synonym_table(photos.classes), encoding="utf-8")
            self.table = SynonymTable(path)

    def invented(self, row: Row, scene: collages.Scene) -> float:
        """Mentions of what is not there."""
        return float(sum(name not in scene.objects for name in self.table.mentions(row["caption"])))

    def mentions(self, row: Row, scene: collages.Scene) -> float:
        """All mentions."""
        return float(len(self.table.mentions(row["caption"])))

    def recall(self, row: Row, scene: collages.Scene) -> float:
        """Share of what is there that is named."""
        named = set(self.table.mentions(row["caption"]))
        return len(named & set(scene.objects)) / len(scene.objects)

    def f1(self, row: Row, scene: collages.Scene) -> float:
        """F1 of the objects that a caption names."""
        named = set(self.table.mentions(row["caption"]))
        return 2 * len(named & set(scene.objects)) / (len(named) + len(scene.objects))

    def words(self, row: Row, scene: collages.Scene) -> float:
        """Length."""
        return float(len(split_words(row["caption"])))


def signed(found: list[float], other: list[float], digits: int, unit: float = 1.0) -> str:
    """A difference in pairs ± its standard error."""
    mean, error = paired(found, other)
    return f"{unit * mean:+.{digits}f} ± {unit * error:.{digits}f}"


def tables(rows: dict[str, Row], scenes: list[collages.Scene], photos: collages.Photos) -> list[str]:
    """All tables, of the pictures that every setting has answered."""
    captions = Captions(photos)
    measures: dict[str, Measure] = {
        "accuracy": accuracy,
        **{name: getattr(captions, name) for name in ("invented", "mentions", "recall", "f1", "words")},
    }
    shown = [name for name in SETTINGS if f"{name}/0" in rows]
    own = {name: [rows[f"{name}/{i}"] for i in range(len(scenes))] for name in shown}
    values: dict[str, dict[str, list[float]]] = {
        name: {
            key: [measure(*pair) for pair in zip(own[name], scenes, strict=True)] for key, measure in measures.items()
        }
        for name in shown
    }
    return [*pope_table(own, values), "", *chair_table(values), "", *claims_table(values)]


def pope_table(own: dict[str, list[Row]], values: dict[str, dict[str, list[float]]]) -> list[str]:
    """Accuracy and F1 of every set, and the differences of accuracy to dense."""
    heads = "setting | random | popular | adversarial | accuracy of all | difference | lost | won | yes | neither"
    lines = [f"| {heads} |", "|---" * 10 + "|"]
    dense = [each for row in own["dense"] for each in is_right(row)]
    for name, rows in own.items():
        cells = []
        for place in range(1, 1 + len(KINDS)):
            answers = [{"Y": "yes", "N": "no"}.get(row["said"][i], "") for row in rows for i in (0, place)]
            found = pope_scores(answers, ["yes", "no"] * len(rows))
            cells.append(f"{100 * found['accuracy']:.1f} ({100 * found['f1']:.1f})")
        right = [each for row in rows for each in is_right(row)]
        pairs = list(zip(dense, right, strict=True))
        cells.append(f"{100 * statistics.mean(values[name]['accuracy']):.1f}")
        cells.append("" if name == "dense" else signed(values[name]["accuracy"], values["dense"]["accuracy"], 1, 100.0))
        cells += ["", ""] if name == "dense" else [str(pairs.count((True, False))), str(pairs.count((False, True)))]
        letters = "".join(row["said"] for row in rows)
        cells += [f"{100 * letters.count(letter) / len(letters):.1f}" for letter in "Y?"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def chair_table(values: dict[str, dict[str, list[float]]]) -> list[str]:
    """CHAIR, and beside it what captions leave out and how long they are."""
    heads = "setting | CHAIR_S | CHAIR_I | invented | difference | recall | F1 | difference | words | difference"
    lines = [f"| {heads} |", "|---" * 10 + "|"]
    for name, found in values.items():
        if name == BLIND:
            continue
        dense = values["dense"]
        sentences = 100 * statistics.mean(count > 0 for count in found["invented"])
        mentions = 100 * sum(found["invented"]) / max(sum(found["mentions"]), 1)
        cells = [f"{sentences:.1f}", f"{mentions:.1f}"]
        for key, unit, digits in (("invented", 1.0, 2), ("recall", 100.0, 1), ("f1", 100.0, 1), ("words", 1.0, 1)):
            cells.append(f"{unit * statistics.mean(found[key]):.{digits}f}")
            if key != "recall":
                cells.append("" if name == "dense" else signed(found[key], dense[key], digits, unit))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def claims_table(values: dict[str, dict[str, list[float]]]) -> list[str]:
    """A line per claim."""
    lines = ["| said | setting | against | difference | F1 of captions | may lose | |", "|---" * 7 + "|"]
    for said, name, other, key, sign, may_lose in CLAIMS:
        if not {name, other} <= values.keys():
            lines.append(f"| {said} | {name} | {other} | | | | not measured |")
            continue
        unit, digits, of = (100.0, 1, "points") if key in ("accuracy", "f1") else (1.0, 2, "a caption")
        mean, error = paired(values[name][key], values[other][key])
        f1, f1_error = paired(values[name]["f1"], values[other]["f1"])
        is_shown = sign * mean + may_lose > 2 * error
        verdict = "shown" if is_shown else "not shown, all pairs alike" if mean == error == 0 else "not shown"
        if key == "invented" and is_shown and f1 < -2 * f1_error:
            verdict = "shown, at a loss of F1"
        beside = signed(values[name]["f1"], values[other]["f1"], 1, 100.0) if key == "invented" else ""
        difference = signed(values[name][key], values[other][key], digits, unit)
        allowed = f"{100 * may_lose:g}" if may_lose else "0"
        lines.append(f"| {said} | {name} | {other} | {difference} {of} | {beside} | {allowed} | {verdict} |")
    return lines


def looking_table(rows: list[Row]) -> list[str]:
    """Whether the quarter that is asked after gets more than it gets when the other object is asked after."""
    lines = ["| map | asked after | other asked after | difference | |", "|---" * 5 + "|"]
    for key, title in (("flow", "VL-SAM's flow"), ("carve", "what CARVE keeps")):
        own = [row[key][which][which] for row in rows for which in (0, 1)]
        other = [row[key][1 - which][which] for row in rows for which in (0, 1)]
        mean, error = paired(own, other)
        verdict = "shown" if mean > 2 * error else "not shown"
        shares = " | ".join(f"{100 * statistics.mean(each):.1f} %" for each in (own, other))
        lines.append(f"| {title} | {shares} | {signed(own, other, 1, 100.0)} points | {verdict} |")
    return lines


def carve_line(rows: list[Row]) -> str:
    """What CARVE's second look does to the answers, all of which should be yes."""
    before, after = ([float(each) for row in rows for each in row[key]] for key in ("before", "after"))
    return (
        f"CARVE, of {len(before)} questions after what is there: {100 * statistics.mean(before):.1f} % answered by yes "
        f"without and {100 * statistics.mean(after):.1f} % with the cut, {signed(after, before, 1, 100.0)} points."
    )


def whole(text: dict[str, Any]) -> str:
    """A sentence on how a model was trained, of the recipe's metrics."""
    after, settings = text["after"], text["settings"]
    named = text["patches_named"]
    return (
        f"{settings['steps']} steps of {settings['batch']} pictures, seed {settings['seed']}, LoRA of rank "
        f"{settings['lora_rank']}, {settings['pictures']} pictures of {settings['pixels']} pixels; of held-out patches "
        f"the aligned projector names {100 * named:.1f} %, and after training {100 * after['accuracy']:.1f} % of the "
        f"{settings['eval_pictures'] * 2 * len(KINDS)} questions of the recipe's own evaluation are answered right."
    )
