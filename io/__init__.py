"""Data: the store, the grids it stands on, the samples cut from it and the batches made of them."""

from smoe_hpc.io.dataset import open_dataset
from smoe_hpc.io.encoding import Encoding
from smoe_hpc.io.grids import Grid
from smoe_hpc.io.series import Series, open_store
from smoe_hpc.io.store import Store
from smoe_hpc.io.store_writer import StoreWriter

__all__ = ["Encoding", "Grid", "Series", "Store", "StoreWriter", "open_dataset", "open_store"]
