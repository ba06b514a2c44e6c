"""Constant fields as models take them: each by its own mean and standard deviation over the grid.

Dimensions: K constants, H latitude rows, W longitude columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from smoe_hpc.errors import DataError
from smoe_hpc.io.names import known_names
from smoe_hpc.io.store.interface import FieldReader


def normalised_constants(store: FieldReader, names: Sequence[str]) -> Tensor:
    """[K, H, W] float32.

    Raises:
        DataError: an unknown constant, or one that is the same everywhere.
    """
    fields = np.empty((len(names), *store.grid.shape), dtype=np.float32)
    for index, name in enumerate(names):
        if name not in store.constants:
            known = known_names(name, store.constants) if store.constants else "it has none"
            raise DataError(f"{store.path} has no constant {name!r}; {known}. Leave it out of data.constants")
        values = store.constants[name].astype(np.float64)
        spread = float(values.std())
        if not spread > 0:
            raise DataError(f"constant {name!r} of {store.path} tells no place from another; leave it out of data.constants")
        fields[index] = (values - values.mean()) / spread
    return torch.from_numpy(fields)
