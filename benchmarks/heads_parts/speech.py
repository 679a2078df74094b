"""Cross attention of a speech model against audio frames: which heads look at the word that is being written."""

import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.io import wavfile
from scipy.signal import resample_poly
from transformers import AutoProcessor, WhisperForConditionalGeneration

from patchattn.core.heads import BaseFacts
from patchattn.core.importance import HeadImportance, SiteScores
from patchattn.core.selection import select_sites
from patchattn.evaluation.report.report import markdown_table
from patchattn.inspection.attention_maps import attention_maps

from .common import Job, Row, Setup, paired, verdict

NAME, STAGE = "speech", 0
RATE, GAP, EDGE = 16_000, 0.12, 0.1  # samples of a second; seconds between words, and of grace around each
WORDS = (
    "the small garden behind our house was full of yellow flowers",
    "my brother bought seven books about ancient ships yesterday",
    "nobody knows where the old captain buried his silver",
    "please bring water and bread before the guests arrive",
    "a heavy storm destroyed several bridges along the river",
    "the teacher explained every question until everyone understood",
    "winter mornings are cold but the kitchen is always warm",
    "they sold the broken piano to a young musician",
    "her letter reached the village after three long weeks",
    "two doctors visited the island during the summer holidays",
    "the market opens early and closes before noon on sunday",
    "green lights along the coast guide the fishing boats home",
)


def jobs(setup: Setup) -> list[Job]:
    if setup.speech is None:
        return []
    return [(str(number), lambda number=number: _row(setup, WORDS[number])) for number in range(len(WORDS))]


def spoken(words: list[str]) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Sound of words said one by one by espeak-ng, and the seconds in which each begins and ends."""
    parts, times, now = [np.zeros(int(GAP * RATE))], [], GAP
    with tempfile.TemporaryDirectory() as folder:
        for word in words:
            file = Path(folder) / "word.wav"
            subprocess.run(["espeak-ng", "-v", "en-us", "-s", "140", "-w", str(file), word], check=True)
            rate, sound = wavfile.read(file)
            sound = resample_poly(sound.astype(np.float64) / 32768, RATE, rate)
            loud = np.flatnonzero(np.abs(sound) > 0.01 * np.abs(sound).max())
            sound = sound[loud[0] : loud[-1] + 1]
            times.append((now, now + len(sound) / RATE))
            parts += [sound, np.zeros(int(GAP * RATE))]
            now += len(sound) / RATE + int(GAP * RATE) / RATE
    return np.concatenate(parts), times


def _row(setup: Setup, text: str) -> Row:
    """`(layers, heads)`: of how many words a head's strongest frame is in the word, and in the next one instead; and
    how much of its attention is there."""
    processor = AutoProcessor.from_pretrained(setup.speech)
    model: Any = WhisperForConditionalGeneration.from_pretrained(setup.speech).eval()
    words = text.split()
    sound, times = spoken(words)
    features = processor(sound, sampling_rate=RATE, return_tensors="pt").input_features
    with torch.inference_mode():
        heard = processor.batch_decode(model.generate(features), skip_special_tokens=True)[0]
    pieces = [processor.tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words]
    start = processor.tokenizer("")["input_ids"][:-1]  # without the end
    ids = [*start, *(token for piece in pieces for token in piece)]
    rows, place = [], len(start) - 1  # a token is written from the row before it
    for piece in pieces:
        rows.append(range(place, place + len(piece)))
        place += len(piece)
    names = [f"^{site.name}$" for site in select_sites(model) if site.is_cross]
    maps = attention_maps(model, {"input_features": features, "decoder_input_ids": torch.tensor([ids])}, modules=names)
    return {"heard": heard, "text": text, **looks(maps, rows, times)}


def looks(maps: Any, rows: list[range], times: list[tuple[float, float]]) -> dict[str, list[list[float]]]:
    """What `_row` gives, from maps of heads, the rows of each word, and its time in seconds."""
    layers = 1 + max(each.site.layer_index for each in maps)
    found: dict[str, list[list[float]]] = {name: [[] for _ in range(layers)] for name in ("hit", "next", "mass")}
    for each in maps:
        seconds = (np.arange(each.weights.shape[1]) + 0.5) * 30 / each.weights.shape[1]
        inside = [(seconds > a - EDGE) & (seconds < b + EDGE) for a, b in times]
        of_word = [np.asarray(each.weights[list(some)].mean(0)) for some in rows]
        strongest = [int(weights.argmax()) for weights in of_word]
        following = [*inside[1:], inside[0]]
        hits = np.mean([part[at] for part, at in zip(inside, strongest, strict=True)])
        other = np.mean([part[at] for part, at in zip(following, strongest, strict=True)])
        mass = np.mean([weights[part].sum() for part, weights in zip(inside, of_word, strict=True)])
        for name, value in (("hit", hits), ("next", other), ("mass", mass)):
            found[name][each.site.layer_index].append(round(float(value), 4))
    return found


def section(setup: Setup, pictures: Path | None) -> list[str]:
    rows = list(setup.rows(NAME).values())
    lines = ["## Cross attention against audio", ""]
    if not rows:
        return [*lines, "Not measured yet."]
    hits, other, mass = (100 * np.array([row[name] for row in rows]) for name in ("hit", "next", "mass"))
    shares, layers, heads = hits.mean(0), hits.shape[1], hits.shape[2]
    errors = hits.std(0, ddof=1) / len(rows) ** 0.5 if len(rows) > 1 else np.full(shares.shape, np.nan)
    order = [divmod(int(place), heads) for place in np.argsort(-shares, axis=None, kind="stable")]
    said = [set(row["text"].split()) for row in rows]
    heard = [{word.strip(".,").lower() for word in row["heard"].split()} for row in rows]
    known = sum(len(a & b) for a, b in zip(said, heard, strict=True)) / sum(map(len, said))
    table = [
        [
            f"{a}-{b}",
            f"{shares[a, b]:.0f} ± {errors[a, b]:.0f}",
            f"{other[:, a, b].mean():.0f}",
            f"{mass[:, a, b].mean():.0f}",
        ]
        for a, b in (*order[:8], order[-1])
    ]
    lines += [
        f"whisper-tiny.en and {len(rows)} sentences of words that espeak-ng said one by one, so that it is known when "
        f"each sounds; the model hears {100 * known:.0f} % of them. The text is forced. A head looks at a word if, "
        f"where it is written, the frame of its largest weight, mean over the word's tokens, is within {EDGE} s of its "
        "sound; to compare, within the next word's sound. Standard errors are over sentences.",
        "",
        *markdown_table(
            ["layer-head", "looks at the word, %", "at the next one", "attention to it, %"], table, texts=1
        ),
        "",
    ]
    best = order[0]  # chosen on one half of the sentences, measured on the other
    half = len(rows) // 2
    chosen = np.unravel_index(hits[:half].mean(0).argmax(), shares.shape) if half else best
    every = paired(hits.mean((1, 2)).tolist(), other.mean((1, 2)).tolist())
    one = paired(hits[half:, *chosen].tolist(), other[half:, *chosen].tolist())
    lines += [
        f"- {int((shares > 50).sum())} of {layers * heads} heads look at the word more often than not.",
        verdict("Heads on the average look at the word rather than at the next one", *every, "points", wants=1),
        verdict(
            f"The best head of the first {half} sentences, {chosen[0]}-{chosen[1]}, does so in the others",
            *one,
            "points",
            wants=1,
        ),
    ]
    if pictures is not None:
        sites = {
            f"layer.{layer}.cross": SiteScores(layer, heads, tuple(shares[layer].tolist())) for layer in range(layers)
        }
        _draw(HeadImportance(sites, NAME, BaseFacts("whisper", layers, heads), {}, 0), pictures / "heads_speech.png")
        lines += ["", "![How often each head looks at the word that is written](heads_speech.png)"]
    return lines


def _draw(importance: HeadImportance, path: Path) -> None:
    from patchattn.plotting import plot_head_importance

    figure = plot_head_importance(importance, title="Cross attention of whisper-tiny.en", label="looks at the word, %")
    figure.savefig(path, dpi=100)
