"""Pictures of a board: what is lost over what is saved, one for every family of methods."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...plotting.pareto import ParetoPoint, plot_pareto
from .measured import COSTS, Measured, cost, family, in_percent, pooled
from .plan import DENSE

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def board_picture(rows: Mapping[str, Measured], name: str, of_family: str | None = None) -> "Figure":
    """Mean difference to dense over a cost.

    Args:
        rows: of `read_rows`.
        name: a key of `COSTS`.
        of_family: the rows of this family alone.

    Raises:
        ValueError: no row of the family has that cost.
    """
    dense = rows[DENSE]
    points = [ParetoPoint(DENSE, 0.0, 1.0)]
    for row_name, row in rows.items():
        if row_name == DENSE or "refused" in row or of_family not in (None, family(row)):
            continue
        lost, value = pooled(row, in_percent(dense)), cost(row, name, dense)
        if lost is not None and value is not None:
            points.append(ParetoPoint(row_name, lost.mean, value))
    if len(points) < 2:
        raise ValueError(f"No row {f'of {of_family}' if of_family else 'of the board'} has the cost {name!r}.")
    return plot_pareto(
        points,
        score="minus dense, mean of tasks, points",
        cost=COSTS[name],
        lower_cost_is_better=name != "decode",
        title=f"What is lost, and what is saved{f': {of_family}' if of_family else ''}",
    )


def family_costs(rows: Mapping[str, Measured]) -> dict[str, str]:
    """Each family to the first of `COSTS` that some of its rows lower or, of speed, change."""
    found: dict[str, str] = {}
    for name in COSTS:
        for row in rows.values():
            value = cost(row, name, rows[DENSE])
            if value is not None and value != 1.0 and family(row):
                found.setdefault(family(row), name)
    return found
