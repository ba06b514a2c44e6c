"""How a batch is made of stored fields, each of them read once: what reading tells decoding.

Packed, a plan is one row of int64, so that it reaches a GPU in one copy and leaves a process of DALI like a field::

    B, I, D, U, V | ids [B] | leads [B] | input index [I, B] | target index [D, B] | rows [U] | target rows [V]

Dimensions: B entries of a batch, I input fields of a sample, D its target fields, U and V distinct input and target fields
of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

_HEADER = 5  # sizes before the lists


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """Rows of the store that a batch needs, each once, and how its samples are made of them. All int64.

    Args:
        rows: [U] of the inputs.
        target_rows: [V] of the targets.
        ids: [B]; -1 fills up the batch.
        leads: [B]; 0 where all samples have the same leads.
        input_index: [I, B] which of ``rows``; 0 in entries that fill up.
        target_index: [D, B] which of ``target_rows``, likewise.
    """

    rows: np.ndarray
    target_rows: np.ndarray
    ids: np.ndarray
    leads: np.ndarray
    input_index: np.ndarray
    target_index: np.ndarray

    @property
    def inputs_in_order(self) -> bool:
        """Whether each input field is used once and in order, so that nothing needs gathering."""
        return len(self.rows) == self.input_index.size

    @property
    def targets_in_order(self) -> bool:
        """Whether each target field is used once and in order."""
        return len(self.target_rows) == self.target_index.size

    @property
    def filled_up(self) -> list[int]:
        """Entries of the batch that are no samples."""
        return np.flatnonzero(self.ids < 0).tolist()

    @staticmethod
    def most_numbers(batch: int, inputs: int, targets: int) -> int:
        """Length of the longest packed plan of a batch.

        Args:
            batch: B.
            inputs: I.
            targets: D.
        """
        return _HEADER + 2 * batch * (1 + inputs + targets)

    def pack(self) -> np.ndarray:
        """One row of int64; see the top of this file."""
        sizes = len(self.ids), len(self.input_index), len(self.target_index), len(self.rows), len(self.target_rows)
        lists = self.ids, self.leads, self.input_index.reshape(-1), self.target_index.reshape(-1), self.rows, self.target_rows
        return np.concatenate([np.array(sizes, dtype=np.int64), *lists])

    @classmethod
    def unpack(cls, packed: np.ndarray) -> BatchPlan:
        """The plan that was packed (views of it).

        >>> plan = BatchPlan(*map(np.array, ([4, 7], [9], [3, -1], [0, 0], [[0, 0], [1, 0]], [[0, 0]])))
        >>> BatchPlan.unpack(plan.pack()).input_index.tolist()
        [[0, 0], [1, 0]]
        """
        batch, inputs, targets, fields, target_fields = packed[:_HEADER].tolist()
        lists = _lists(packed, batch, inputs, targets)
        rows = packed[_HEADER + batch * (2 + inputs + targets) :]
        return cls(rows[:fields], rows[fields : fields + target_fields], *lists)

    def lists_of(self, packed: Any) -> tuple[Any, Any, Any, Any]:
        """Ids, leads, input index and target index of this plan as views of its packed form, a tensor of any device."""
        return _lists(packed, len(self.ids), len(self.input_index), len(self.target_index))


def _lists(packed: Any, batch: int, inputs: int, targets: int) -> tuple[Any, Any, Any, Any]:
    lists = packed[_HEADER : _HEADER + batch * (2 + inputs + targets)].reshape(-1, batch)
    return lists[0], lists[1], lists[2 : 2 + inputs], lists[2 + inputs :]
