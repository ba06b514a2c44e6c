"""What a user would write instead of the loader: a torch Dataset over xarray or over h5py, in a torch DataLoader.

Both give the same samples as the loader (three input fields of all channels, three target channels, normalised float32),
opened once in every worker, read sample by sample. They are written as the documentation of those libraries suggests.

Dimensions: C channels, H latitude rows, W longitude columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class _PerSample(Dataset[tuple[Tensor, Tensor]], ABC):
    """One sample at a time; files are opened at first use, which happens in the worker.

    Args:
        path: a store file.
        input_rows: [S, I].
        target_rows: [S].
        targets: indices of the target channels.
        mean: [C, 1, 1] of the input channels.
        std: likewise.
    """

    def __init__(
        self,
        path: Path,
        input_rows: np.ndarray,
        target_rows: np.ndarray,
        targets: list[int],
        mean: np.ndarray,
        std: np.ndarray,
    ) -> None:
        self.path, self.input_rows, self.target_rows, self.targets = path, input_rows, target_rows, targets
        self.mean, self.std = mean, std
        self.source: Any = None

    def __len__(self) -> int:
        return len(self.target_rows)

    @abstractmethod
    def open(self) -> Any:
        """The library's view of the fields, [time, channel, lat, lon]."""

    @abstractmethod
    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Fields of some rows, all channels."""

    @abstractmethod
    def target(self, row: int) -> np.ndarray:
        """Target channels of a row."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.source is None:
            self.source = self.open()
        inputs = (self.rows(self.input_rows[index]) - self.mean) / self.std
        target = (self.target(int(self.target_rows[index])) - self.mean[self.targets]) / self.std[self.targets]
        return torch.from_numpy(inputs.reshape(-1, *inputs.shape[2:])), torch.from_numpy(target)


class XarrayDataset(_PerSample):
    """Over ``xarray.open_dataset(..., engine="h5netcdf")``."""

    def open(self) -> Any:
        """See `_PerSample.open`."""
        import xarray

        return xarray.open_dataset(self.path, engine="h5netcdf").fields

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """See `_PerSample.rows`."""
        return np.asarray(self.source.isel(time=rows).values)

    def target(self, row: int) -> np.ndarray:
        """See `_PerSample.target`."""
        return np.asarray(self.source.isel(time=row, channel=self.targets).values)


class H5pyDataset(_PerSample):
    """Over ``h5py.File``."""

    def open(self) -> Any:
        """See `_PerSample.open`."""
        import h5py

        return h5py.File(self.path, "r")["fields"]

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """See `_PerSample.rows`."""
        return np.stack([self.source[row] for row in rows])

    def target(self, row: int) -> np.ndarray:
        """See `_PerSample.target`."""
        return np.asarray(self.source[row][self.targets])


BASELINES: dict[str, type[_PerSample]] = {"xarray + DataLoader": XarrayDataset, "h5py + DataLoader": H5pyDataset}


def baseline_batches(
    dataset: _PerSample, order: np.ndarray, batch: int, workers: int, device: torch.device
) -> Iterator[Tensor]:
    """Input batches in the given order, on the device, by a DataLoader with worker processes."""
    loader = DataLoader(
        dataset,
        batch_size=batch,
        sampler=order.tolist(),
        num_workers=workers,
        drop_last=True,
        pin_memory=device.type == "cuda",
        multiprocessing_context="spawn",  # HDF5's handles do not outlive a fork
    )
    for inputs, targets in loader:
        yield inputs.to(device, non_blocking=True)
        targets.to(device, non_blocking=True)
