"""The command `patchattn calibrate bases`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .calibrate import Device, Model


def calibrate_bases(
    model: Model,
    count: Annotated[int, typer.Option(help="Bases to find at most, beside the model's own.", min=1)] = 5,
    first: Annotated[
        int | None, typer.Option(help="Least distance that counts, in tokens; a quarter of --last by default.", min=0)
    ] = None,
    last: Annotated[
        int | None, typer.Option(help="Largest distance that counts; by default what the model was trained to.", min=1)
    ] = None,
    lowest: Annotated[float, typer.Option(help="Smallest candidate, as a multiple of the model's own base.")] = 1.05,
    highest: Annotated[float, typer.Option(help="Largest candidate, as a multiple of it.")] = 3.0,
    step: Annotated[float, typer.Option(help="Difference between one candidate and the next.")] = 0.05,
    within: Annotated[int, typer.Option(help="How many tokens a peak may be from a trough it covers.", min=0)] = 3,
    output: Annotated[Path, typer.Option("--output", "--out", help="Where to write the bases.")] = Path("bases.json"),
    device: Device = None,
) -> None:
    """Find rotary bases whose waves of attention have their peaks where the others have troughs.

    `patch_model(model, "attention_buckets", bases=[...])` then merges branches with them. No data are read.
    """
    from ..calibration.rotary_bases import complementary_bases, rotary_frequencies
    from ..files.documents import write_json
    from .common import language_model

    if step <= 0 or not 0 < lowest <= highest:
        raise ValueError(f"Candidates go from --lowest up to --highest by --step, got {lowest}, {highest} and {step}.")
    _, loaded = language_model(model, device)
    frequencies, length = rotary_frequencies(loaded)
    end = last or length
    distances = (end // 4 if first is None else first, end)
    steps = int((highest - lowest) / step + 1e-9)
    candidates = [round(lowest + number * step, 9) for number in range(steps + 1)]
    found = complementary_bases(frequencies, count=count, distances=distances, candidates=candidates, within=within)
    Console(highlight=False).print(
        f"{', '.join(map(str, found.bases)) or 'No base'}: {found.covered} of {found.troughs} troughs are covered. "
        f"Wrote {output}",
        soft_wrap=True,
    )
    waves = dict(zip(("1.0", *map(str, found.bases)), found.waves, strict=True))
    plain = {base: {"peaks": list(wave.peaks), "troughs": list(wave.troughs)} for base, wave in waves.items()}
    write_json(output, {"bases": list(found.bases), "distances": list(distances), "within": within, "waves": plain})
