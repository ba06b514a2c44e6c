"""The short way to a few samples: read here and now, by the caller.

Dimensions: B samples.
"""

from __future__ import annotations

import numpy as np
import torch

from smoe_hpc.io.loading.batch import Batch
from smoe_hpc.io.loading.decoding import Decoder, StoredBatch
from smoe_hpc.io.loading.frames import FrameTable, read_frames


def fetch(table: FrameTable, decoder: Decoder, ids: np.ndarray) -> Batch:
    """The samples of ids [B], decoded; -1 gives zeros.

    Raises:
        DataError: an id out of range, or a store that cannot be read.
    """
    plan = table.plan(ids)
    stored, shape = table.store.encoding.stored_type, table.store.grid.shape
    frames = np.empty((len(plan.rows), len(table.input_channels), *shape), dtype=stored)
    targets = np.empty((len(plan.target_rows), len(table.target_channels), *shape), dtype=stored)
    read_frames(table, (plan.rows, plan.target_rows), (frames, targets))
    return decoder(StoredBatch(plan, torch.from_numpy(plan.pack()), torch.from_numpy(frames), torch.from_numpy(targets)))
