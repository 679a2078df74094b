"""Connected regions of maps over an image."""

import torch


def regions(kept: torch.Tensor) -> list[torch.Tensor]:
    """Parts of a map whose cells hang together by their sides.

    Args:
        kept: `(rows, columns)` bool.

    Returns:
        Of each part `(n, 2)` rows and columns of its cells; parts in the order of their first cells, row by row.
    """
    left = {(row, column) for row, column in kept.nonzero().tolist()}
    found = []
    for start in sorted(left):
        if start not in left:
            continue
        left.remove(start)
        part = [start]
        for row, column in part:  # which grows while it is gone through
            for near in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                if near in left:
                    left.remove(near)
                    part.append(near)
        found.append(torch.tensor(part))
    return found
