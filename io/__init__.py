"""Data: the store, the grids it stands on, the samples cut from it and the batches made of them.

The whole way of the data, in order:

1. A converter (`convert/`), a generator (`synthetic/`) or a script gives physical fields to `store/writer.py`, which has
   them checked and encoded (`store/contents.py`, `store/encoding.py`) and writes one HDF5 file, whole or not at all
   (`store/layout.py` says what is where in it).
2. `store/multi_file.py` opens a file, or a folder with its index (`store/index.py`), as one row of fields, which
   `store/reader.py` reads at their offsets in the files, through as few open files as `access/open_files.py` keeps.
3. `sampling/` says which rows make a sample (`windows.py`, within `splits.py`) and in which order samples come
   (`order.py`); `statistics/` computes what normalises channels once, and keeps it beside the data (`cache.py`).
4. For each batch `loading/frames.py` plans which rows are read, each once (`batch_plan.py`), and a backend brings them to
   the device as they are stored, ahead of the model: threads (`loading/threads.py`) or processes (`loading/dali/`).
5. There `loading/decoding.py` normalises them and puts them together into a `loading/batch.py`, with constants, leads,
   starts and grid; `loading/loader.py` drives all this. (Starts without truth: `smoe_hpc/inference/inputs.py`.)

Indices are called by what they count:

========  ===============================================================================================================
row       a stored field, counted through all files of a store
start     a sample's start, counted among those whose windows are whole
id        a sample, whatever the epoch: its start, or start * L + lead index; -1 fills up a batch
position  a sample in the order of an epoch
entry     a sample in a batch
index     anything else, named before it: channel index, input index
========  ===============================================================================================================
"""

from smoe_hpc.io.grids import Grid
from smoe_hpc.io.store.encoding import Encoding
from smoe_hpc.io.store.multi_file import Series, open_store
from smoe_hpc.io.store.reader import Store
from smoe_hpc.io.store.writer import StoreWriter
from smoe_hpc.io.store.xarray_view import open_dataset

__all__ = ["Encoding", "Grid", "Series", "Store", "StoreWriter", "open_dataset", "open_store"]
