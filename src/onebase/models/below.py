"""Hidden states below an adapter's first layer: computed once for all rows, and read back from a file ever after.

Nothing there learns, so they are the same in every epoch: with adapters on the top layers only, a step then computes
those layers alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from onebase.data.pack import by_length
from onebase.data.template import Encoded
from onebase.data.trie import Layout, layout
from onebase.files import unnamed_file
from onebase.models.engine import Engine

BATCH = 16  # rows that are computed at once


class Below:
    """The states of these rows, by their tokens. Made in one fixed order, so that a resumed run has the same bits.

    The file lies in `folder`, has no name, and goes with this object. Raises OutputError where the disk is full.
    """

    def __init__(self, engine: Engine, rows: Sequence[Encoded], folder: Path) -> None:
        unique = list({tuple(row.ids): row for row in rows}.values())
        self._starts: dict[tuple[int, ...], int] = {}
        count, like = 0, torch.empty(0)
        with unnamed_file(folder) as file:
            for batch in by_length(unique, BATCH):
                here = [unique[index] for index in batch]
                # Unshared, each row stands whole, one after the other.
                like = engine.states_below(layout(here, share=False)).cpu().contiguous()
                file.write(like.view(torch.uint8).numpy().data)
                for row in here:
                    self._starts[tuple(row.ids)] = count
                    count += len(row.ids)
            file.flush()
            held = np.memmap(file, dtype=np.uint8, mode="c")  # a private map: nothing is ever written back
        self._states = torch.from_numpy(held).view(like.dtype).view(count, -1)

    def states(self, rows: Sequence[Encoded], laid: Layout) -> Tensor | None:
        """The states (T, D) of the rows' layout; None where a row is not among those that were computed."""
        starts = [self._starts.get(tuple(row.ids)) for row in rows]
        known = [start for start in starts if start is not None]
        if len(known) < len(starts):
            return None
        return self._states[torch.tensor(known)[laid.rows] + laid.positions]
