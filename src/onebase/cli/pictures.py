"""Pictures made of characters: a heat map of the layers, and bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from onebase.adapters.targets import split_path

BLOCKS, PLAIN = " ▁▂▃▄▅▆▇█", " .:-=+*%#"  # from 0 to the largest value
NONE = "·"  # the layer has no such module


class Row(NamedTuple):
    """One projection over all layers: a character a column, and the mean of its values."""

    name: str
    cells: str
    mean: float


class HeatMap(NamedTuple):
    """Rows of cells, and what they mean: how many layers a column holds, and the value of the fullest cell."""

    rows: list[Row]
    layers: int  # in one column; it shows their largest
    top: float


def heat_map(values: Mapping[str, float | None], width: int, plain: bool = False) -> HeatMap:
    """Module paths to a picture at most `width` columns wide: a row for each projection, layers from left to right.

    Cells are linear in the value; a module outside the layers is a row of its own. `plain` draws in ASCII.
    """
    grid: dict[str, dict[int, float]] = {}
    for path, value in values.items():
        stack, layer, rest = split_path(path)
        name = path if layer is None else f"{stack}.*.{rest}"
        if value is not None:
            grid.setdefault(name, {})[layer or 0] = value
    top = max((value for cells in grid.values() for value in cells.values()), default=0.0)
    last = max((layer for cells in grid.values() for layer in cells), default=0)
    step = -(-(last + 1) // max(1, width))
    count = -(-(last + 1) // step)
    rows = [
        Row(name, _cells(cells, step, count, top, plain), sum(cells.values()) / len(cells))
        for name, cells in grid.items()
    ]
    return HeatMap(rows, step, top)


def _cells(cells: Mapping[int, float], step: int, count: int, top: float, plain: bool) -> str:
    """The row's characters; a single one where there is one value alone."""
    if len(cells) == 1:
        return _cell([*cells.values()], top, plain)
    columns: dict[int, list[float]] = {}
    for layer, value in cells.items():
        columns.setdefault(layer // step, []).append(value)
    return "".join(_cell(columns.get(column, []), top, plain) for column in range(count))


def _cell(values: Sequence[float], top: float, plain: bool) -> str:
    marks = PLAIN if plain else BLOCKS
    if not values:
        return "-" if plain else NONE
    if not top or not max(values):
        return "0"
    return marks[max(1, round(max(values) / top * (len(marks) - 1)))]


def bar(value: float, top: float, width: int, plain: bool = False) -> str:
    """A bar as long as the value's share of `top`."""
    filled = round(width * min(1.0, value / top)) if top > 0 else 0
    return ("#" if plain else "█") * filled
