"""What a model card says of an evaluation is written elsewhere, by a module that is handed over by its name."""

import importlib
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Protocol, cast


class CardReport(Protocol):
    """A module with these functions."""

    def card_section(self, path: str | PathLike[str], patches: Sequence[Mapping[str, Any]]) -> str:
        """The section on these patches, from the report of an evaluation."""

    def eval_results(self, path: str | PathLike[str], patches: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Every score of these patches, as the Hub reads it."""


_modules: list[str] = []


def offer_card_report(module: str) -> None:
    """Make known, by its dotted name, the module that reads reports."""
    _modules.append(module)


def card_report() -> CardReport:
    """The module that reads reports; it is imported when a card is to show one."""
    return cast(CardReport, importlib.import_module(_modules[0]))
