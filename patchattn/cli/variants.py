"""`patchattn list` and `patchattn info`: which variants there are, and all that is known of one."""

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from ..core.variant import VariantInfo

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

_ACTS_ON = {"attention": "attention", "surgery": "weights", "decoding": "logits", "cache": "kv cache"}
_NAMES = 22  # columns


def list_variants_(
    kind: Annotated[str | None, typer.Option(help="Only those that act so: attention, surgery or decoding.")] = None,
    family: Annotated[str | None, typer.Option(help="Only those of a mechanism, such as temperature.")] = None,
    needs_training: Annotated[
        bool | None,
        typer.Option("--needs-training/--training-free", help="Only those that need training, or need none."),
    ] = None,
    capability: Annotated[
        list[str] | None, typer.Option(help="Only those that support this, such as kv_cache; may be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The variants that can be patched in, by mechanism."""
    from rich.table import Table

    from ..core.registry import list_variants, variant_info

    chosen = [
        variant_info(name)
        for name in list_variants(
            kind,  # type: ignore[arg-type]
            family=family,
            needs_training=needs_training,
            capability=capability,  # type: ignore[arg-type]
        )
    ]
    if as_json:
        print(json.dumps([_facts(info) for info in chosen], indent=2))
        return
    console = Console(highlight=False)
    for mechanism, infos in groupby(sorted(chosen, key=lambda info: info.family), key=lambda info: info.family):
        members, table = list(infos), Table.grid(padding=(0, 1))
        for width in (_NAMES, None, len("2410.11842"), len("training")):
            table.add_column(width=width)
        for info in members:
            training = "training" if info.needs_training else ""
            table.add_row(f"  {info.name}", info.summary, info.arxiv_id or "-", training)
        console.print(f"[bold]{mechanism}[/] ({_ACTS_ON[members[0].kind]})")
        console.print(table)
    console.print("\ntraining: of use only after training. `patchattn info NAME` says more of one.")


def info_(
    name: Annotated[str, typer.Argument(help="A variant, as `patchattn list` names it.")], as_json: AsJson = False
) -> None:
    """Paper, code, capabilities, every setting and every preset of a variant."""
    from typing import get_type_hints

    from rich.padding import Padding

    from ..core.registry import variant_info

    console, variant = Console(highlight=False), variant_info(name)
    hints = get_type_hints(variant.variant.config_class)
    if as_json:
        fields = {
            key: {
                "default": field["default"],
                "takes": _allowed(field, hints[key]),
                "unit": field["unit"],
                "help": field["help"],
                "source": field["source"],
            }
            for key, field in variant.config_fields.items()
        }
        presets = {preset: dict(settings) for preset, settings in variant.presets.items()}
        print(json.dumps({**_facts(variant), "settings": fields, "presets": presets}, indent=2))
        return
    console.print(f"[bold]{variant.name}[/]: {variant.title} ({variant.year})")
    console.print(variant.summary)
    facts = {
        "paper": f"https://arxiv.org/abs/{variant.arxiv_id}" if variant.arxiv_id else "none",
        "code": variant.code or "none released",
        "adds": variant.extra_parameters,
        "kind": variant.kind,
        "needs training": "yes" if variant.needs_training else "no",
        **({"from scratch only": f"with {variant.variant.from_scratch}"} if variant.variant.from_scratch else {}),
        "supports": ", ".join(sorted(variant.capabilities)),
    }
    for key, value in facts.items():
        console.print(f"  {key}: {value}", soft_wrap=True)
    for key, field in variant.config_fields.items():
        unit = f" {field['unit']}" if field["unit"] else ""
        console.print(f"\n[bold]{key}[/] = {field['default']}{unit}   ({_allowed(field, hints[key])})")
        console.print(Padding(f"{field['help']}\nDefault: {field['source']}", (0, 0, 0, 4)))
    for preset, settings in variant.presets.items():
        spelt = ", ".join(f"{key}={value!r}" for key, value in settings.items())
        console.print(f"\n[bold]preset={preset}[/]")
        console.print(f"    {spelt}", soft_wrap=True, markup=False)


def _facts(info: "VariantInfo") -> dict[str, Any]:
    """What is known of a variant, as JSON has it."""
    return {
        "name": info.name,
        "title": info.title,
        "arxiv_id": info.arxiv_id,
        "year": info.year,
        "code": info.code,
        "summary": info.summary,
        "kind": info.kind,
        "family": info.family,
        "needs_training": info.needs_training,
        "from_scratch": info.variant.from_scratch,
        "extra_parameters": info.extra_parameters,
        "capabilities": sorted(info.capabilities),
    }


def _allowed(field: dict[str, Any], hint: Any) -> str:
    """The values that a setting takes, in words."""
    from types import UnionType
    from typing import Literal, Union, get_args, get_origin

    if hint is bool:
        return "True or False"
    choices = field["choices"] or (get_args(hint) if get_origin(hint) is Literal else None)
    if choices:
        return " or ".join(map(str, choices))
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    low, high = ("" if field[bound] is None else f"{field[bound]:g}" for bound in ("minimum", "maximum"))
    numbers = f"{low} to {high}" if low and high else f"at least {low}" if low else f"at most {high}" if high else "any"
    words = {float: numbers, int: numbers, str: "text", Path: "a file", type(None): "None"}
    words |= {tuple: "several", Sequence: "several", dict: "a mapping", Mapping: "a mapping"}
    kinds = [get_origin(part) or part for part in parts]
    return " or ".join(dict.fromkeys(words.get(kind) or f"a {kind.__name__}" for kind in kinds))
