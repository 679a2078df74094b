"""What was measured, as it is written to JSON."""

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from ..files.documents import laid_out, read_json, write_json
from .cases import Case
from .ceilings import Ceilings
from .goals import judged
from .result import Result

SCHEMA = 2
CLOCKS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
# What of a machine may be another where a run is resumed.
OF_A_CALL = ("date", "command", "resumed")


@dataclass
class Report:
    """All results of one call of the benchmark, and what they were measured with."""

    machine: dict[str, str]
    ceilings: Ceilings | None = None
    results: list[Result] = field(default_factory=list)
    conditions: list[dict[str, str]] = field(default_factory=list)

    def finished(self, case: Case, names: Sequence[str]) -> bool:
        """Whether a case has a result of each of these implementations, none of them cut off by a time limit."""
        rows = {row.implementation: row.status for row in self.results if row.case == case}
        return all(rows.get(name, "not run") != "not run" for name in names)

    def without(self, case: Case) -> None:
        """Forget the results of a case."""
        self.results = [row for row in self.results if row.case != case]
        self.conditions = [row for row in self.conditions if row["case"] != case.name]

    def to_dict(self) -> dict[str, Any]:
        """What is written to JSON."""
        rows = []
        for row in self.results:
            figures = {"useful_tflops": row.useful_tflops, "share_of_ceiling": row.share_of_ceiling}
            cells = {**asdict(row), "case": {"name": row.case.name, **asdict(row.case)}, **figures}
            # an error that is not a number has no place in JSON; the reason tells it
            rows.append({key: None if value != value else value for key, value in cells.items()})
        return {
            "schema": SCHEMA,
            "machine": self.machine,
            "ceilings": None if self.ceilings is None else asdict(self.ceilings),
            "goals": [asdict(verdict) for verdict in judged(self.results)],
            "conditions": self.conditions,
            "results": rows,
        }

    @classmethod
    def read(cls, path: Path) -> Self:
        """The report in a JSON file.

        Raises:
            ValueError: it was written by another version of the format.
        """
        content = read_json(path)
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            found = content.get("schema") if isinstance(content, dict) else None
            raise ValueError(f"{path} holds results of schema {found}; this version reads schema {SCHEMA}.")
        results = []
        with laid_out(path):
            for row in content["results"]:
                given = {key: value for key, value in row.items() if key not in ("useful_tflops", "share_of_ceiling")}
                case = {key: value for key, value in given.pop("case").items() if key != "name"}
                results.append(Result(case=Case(**case), **given))
            ceilings = content["ceilings"]
            ceilings = None if ceilings is None else Ceilings(**ceilings)
            return cls(content["machine"], ceilings, results, content["conditions"])

    @classmethod
    def resumed(cls, path: Path, machine: dict[str, str]) -> Self:
        """The report in a JSON file, to be gone on with on a machine.

        Raises:
            ValueError: it was measured on another device or with other versions, which one table cannot compare.
        """
        report = cls.read(path)
        for name in (report.machine.keys() | machine.keys()) - set(OF_A_CALL):
            before, now = report.machine.get(name), machine.get(name)
            if before != now:
                raise ValueError(
                    f"{path} was measured with {name} {before}, and this is {name} {now}: no table compares the two. "
                    "Give another --output, or leave out --resume to measure everything anew."
                )
        report.machine["resumed"] = machine["date"]
        return report

    def write(self, path: Path) -> None:
        """To a JSON file, all at once: a run that is killed leaves the last whole one."""
        write_json(path, self.to_dict())


def machine(device: torch.device, command: str) -> dict[str, str]:
    """Device, versions, date and command."""
    gpu = device.type == "cuda"
    facts = {
        "device": torch.cuda.get_device_name(device) if gpu else f"{platform.machine()} CPU",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "patchattn": _version("patchattn"),
        "kernels": os.environ.get("PATCHATTN_KERNELS", "auto"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
    }
    if gpu:
        facts |= {"cuda": str(torch.version.cuda), "driver": _driver(device)}
    return facts


def conditions(device: torch.device, case: Case, when: str) -> dict[str, str]:
    """Clocks, power and temperature of a GPU `when` a case begins or ends; empty where `nvidia-smi` does not tell.

    Args:
        device: which.
        case: which.
        when: in words.
    """
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return {}
    told = _query(device, ",".join(CLOCKS)).split(", ")
    return {"case": case.name, "when": when, **dict(zip(CLOCKS, told, strict=True))} if len(told) == len(CLOCKS) else {}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "from a checkout" if package == "patchattn" else "not installed"


def _driver(device: torch.device) -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    return _query(device, "driver_version") or "unknown"


def _query(device: torch.device, what: str) -> str:
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"  # numbers are others where some devices are hidden
    query = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader", f"--id={uuid}"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
