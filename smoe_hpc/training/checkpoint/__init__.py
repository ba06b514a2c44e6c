"""Checkpoints: logical tensors that any number of ranks and any ZeRO stage can load, whole or not there.

A checkpoint is a folder ``step_N``::

    manifest.json                 every tensor's name, shape, dtype and file; a checksum of every file; the recipe's hash,
                                  the grid, and the small state (step, position in the epoch, schedule) as plain JSON
    tensors_00000.safetensors     a few files sized to the data, shared among the ranks that write

It is written under another name, synced, and renamed when whole, so a process may die at any moment. Nothing random is
kept: order and noise are functions of seed, epoch and step. Nothing in it can run code: the manifest is JSON whose every
entry is checked, the tensors are safetensors, and only regular files inside the folder are opened.

Rooms: `folder` (the checkpoints of a run: save, newest, prune), `manifest` (what is read and checked), `shards` (tensors
to files and back), `fitting` (is it of this model), `first_format` and `upgrade` (those of earlier versions).
"""

from smoe_hpc.training.checkpoint.fitting import check_fits
from smoe_hpc.training.checkpoint.folder import Checkpoints
from smoe_hpc.training.checkpoint.manifest import OutdatedCheckpoint, Saved, read
from smoe_hpc.training.checkpoint.shards import load

__all__ = ["Checkpoints", "OutdatedCheckpoint", "Saved", "check_fits", "load", "read"]
