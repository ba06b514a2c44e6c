"""Metrics of a run: metrics.jsonl, which repeats to the bit, timing.jsonl, which does not, and TensorBoard.

A step's loss stays on the device, one small tensor a step. `StepRecords` reads a few dozen of them back together, as
means over ranks, so that neither a host synchronisation nor a collective happens in each step. `JsonLines` counts its
bytes: a checkpoint notes the count, and a resumed run cuts the file back to it, so that it holds each step once. A run
goes on without timing if that file is damaged.
"""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from smoe_hpc.errors import RunError
from smoe_hpc.files import writing
from smoe_hpc.runs import layout
from smoe_hpc.runs.directory import RunDirectory
from smoe_hpc.training.processes import Processes

_logger = logging.getLogger(__name__)


class JsonLines:
    """A file of one JSON value a line, written by rank 0.

    What is cut from the end of a file that is there lies in ``<file>.cut`` until `forget_cut`: a run that begins anew must
    not have destroyed an older one's lines before it has something of its own.

    Args:
        path: the file, created if missing.
        keep: bytes of the file to keep (from a checkpoint); the rest belongs to steps that will be repeated.
        active: False on ranks that only follow.
    """

    def __init__(self, path: Path, keep: int, active: bool) -> None:
        self._file = None
        self._cut = path.with_name(f"{path.name}{layout.CUT}")
        if active:
            self._file = writing.open_to_append(path)
            there = self._file.seek(0, os.SEEK_END)
            keep = min(keep, there)
            if there > keep:
                self._file.seek(keep)
                self._set_aside(self._file.read())
            self._file.truncate(keep)
            self._file.seek(keep)
        self.size = keep

    def _set_aside(self, lines: bytes) -> None:
        """Keep what is cut off; of several restarts in a row, the longest."""
        if not self._cut.exists() or self._cut.stat().st_size < len(lines):
            writing.write_whole(self._cut, lines)

    def forget_cut(self) -> None:
        """Delete what was cut off, once its replacement is safe."""
        if self._file:
            self._cut.unlink(missing_ok=True)

    def write(self, value: dict[str, Any]) -> None:
        """Append a line."""
        line = (json.dumps(value, allow_nan=False) + "\n").encode()
        self.size += len(line)
        if self._file:
            self._file.write(line)

    def flush(self, durable: bool = False) -> None:
        """Hand lines to the system, and to the disk if ``durable``."""
        if self._file:
            self._file.flush()
            if durable:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close the file."""
        if self._file:
            self._file.close()


class StepRecords:
    """Metrics of steps that have not been read back yet.

    Args:
        processes: the ranks over which means are taken.
        log_every: metrics beside the loss are kept of every so many steps.
    """

    def __init__(self, processes: Processes, log_every: int) -> None:
        self._processes = processes
        self._log_every = log_every
        self._steps: list[tuple[int, int, list[str]]] = []
        self._values: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._steps)

    def logged(self, step: int) -> bool:
        """Whether a step gets a line of its own."""
        return step % self._log_every == 0

    def add(self, step: int, epoch: int, loss: Tensor, others: dict[str, Tensor]) -> None:
        """Keep a step's metrics, 0-d tensors of this rank."""
        self._steps.append((step, epoch, list(others)))
        self._values.append(torch.stack([loss, *(v.to(loss) for v in others.values())]) if others else loss.reshape(1))

    def take(self) -> list[tuple[int, int, dict[str, float]]]:
        """(step, epoch, {name: mean over ranks}) of all steps kept, in order (collective)."""
        if not self._steps:
            return []
        flat = torch.cat(self._values).double()
        self._processes.sum(flat)
        numbers = iter((flat / self._processes.world).tolist())
        taken = [(step, epoch, {name: next(numbers) for name in ("loss", *others)}) for step, epoch, others in self._steps]
        self._steps, self._values = [], []
        return taken


class Log:
    """The files that a run writes while it trains.

    Args:
        run: where metrics.jsonl, timing.jsonl and tensorboard/ lie.
        sizes: bytes of each file to keep, as `sizes` gave them; empty for a new run.
        active: True on rank 0.
        tensorboard: write event files too.
        step: steps done so far; later ones in the event files are hidden.
    """

    def __init__(self, run: RunDirectory, sizes: dict[str, int], *, active: bool, tensorboard: bool, step: int) -> None:
        try:
            self._metrics = JsonLines(run.metrics, sizes.get("metrics", 0), active)
        except OSError as error:
            why = str(error) if error.strerror is None else f"{run.metrics} cannot be written ({error.strerror})"
            raise RunError(f"{why}; remove what is in the way, or choose another name") from error
        self._timing = _timing(run.timing, sizes.get("timing", 0), active)
        self._events: Any = None
        if tensorboard and active:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise RunError("run.tensorboard=true needs the package tensorboard: pip install tensorboard") from None
            self._events = SummaryWriter(str(run.tensorboard), purge_step=step + 1)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._metrics.close()
        self._timing.close()
        if self._events:
            self._events.close()

    def sizes(self) -> dict[str, int]:
        """Bytes written so far, for a checkpoint; what they count is on the disk."""
        self._metrics.flush(durable=True)
        self._timing.flush()
        return {"metrics": self._metrics.size, "timing": self._timing.size}

    def saved(self) -> None:
        """Call this when a checkpoint is on the disk: lines that were cut off at the start are deleted."""
        self._metrics.forget_cut()
        self._timing.forget_cut()

    def event(self, kind: str, step: int, epoch: int, **values: Any) -> None:
        """A line of metrics.jsonl: ``{"event": kind, "step", "epoch", ...}``; non-finite numbers become null."""
        self._metrics.write({"event": kind, "step": step, "epoch": epoch, **_finite(values)})
        if self._events:
            for name, value in _numbers(values):
                self._events.add_scalar(f"{kind}/{name}", value, step)

    def timing(self, **values: Any) -> None:
        """A line of timing.jsonl."""
        self._timing.write(values)

    def flush(self) -> None:
        """Let readers see everything so far."""
        self._metrics.flush()
        self._timing.flush()


def _timing(path: Path, keep: int, active: bool) -> JsonLines:
    """The timing file; if it cannot be written, a warning, and no timing."""
    try:
        return JsonLines(path, keep, active)
    except OSError as error:
        _logger.warning("no timing is written: %s", error if error.strerror is None else f"{path}: {error.strerror}")
        return JsonLines(path, keep, active=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append((prefix + name, float(value)))
    return found
