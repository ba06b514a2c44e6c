"""Clocks of the benchmark of the layer: events, replays of a CUDA graph, the host's own time, peak memory, and the rates of
the device that figures are compared with.

A GPU works behind the host's back, so three clocks say different things. *Events* around a call measure it as an eager
program sees it: waits for the host included, where the host is the slower one. *Graph* replays leave the host out: what the
device needs. *Host* is the time until the call returns, nothing waited for.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

_WARM_UP = 3
_TOGETHER = 8  # calls between two waits: enough for the host to run ahead, too few to fill the launch queue
_FEWEST = 5
_EMPTYING_BYTES = 256 << 20  # read between two calls, several times any L2 cache


@dataclass(frozen=True)
class Timing:
    """Medians in milliseconds.

    Args:
        events: between events before and after an eager call; on a CPU the time of the call.
        graph: of a replay of the call captured in a CUDA graph; None on a CPU, or where it could not be captured.
        host: until the eager call returned; None on a CPU.
        no_graph: why there is no graph, in a line; None where there is one.
    """

    events: float
    graph: float | None = None
    host: float | None = None
    no_graph: str | None = None

    @property
    def device(self) -> float:
        """What the device needs: the graph's time where there is one."""
        return self.events if self.graph is None else self.graph


class Clock:
    """Measures calls on one device.

    Args:
        device: where the calls compute; a GPU must be torch's current one, see :func:`working_on`.
        repeats: calls that a median is taken over, at most.
        seconds: about how long one measurement may take; long calls are repeated less often, five times at least.
        cold: empty the device's caches before each call by reading something larger.
    """

    def __init__(self, device: torch.device, *, repeats: int = 50, seconds: float = 0.1, cold: bool = True) -> None:
        self.device, self.repeats, self.seconds = device, repeats, seconds
        self.on_gpu = device.type == "cuda"
        self._large = torch.ones(_EMPTYING_BYTES // 4, device=device) if cold and self.on_gpu else None

    def measure(self, call: Callable[[], Any], *, graph: bool = True) -> Timing:
        """Medians over calls; the first few, which may compile or allocate, are left out."""
        for _ in range(_WARM_UP):
            call()
        if not self.on_gpu:
            return Timing(statistics.median(self._wall_times(call)))
        events, host = self._event_times(call)
        if not graph:
            return Timing(events, None, host, "not asked for")
        try:
            captured, keep = self._capture(call)
        except RuntimeError as error:
            torch.cuda.synchronize()
            return Timing(events, None, host, first_line(error))
        times, _ = self._event_times(captured.replay)
        del captured, keep
        return Timing(events, times, host)

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """Bytes that a call holds at its fullest beyond what is held before it; None on a CPU."""
        if not self.on_gpu:
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before

    def held_bytes(self) -> int:
        """Bytes of tensors held on the GPU; 0 on a CPU."""
        return torch.cuda.memory_allocated() if self.on_gpu else 0

    def clean(self) -> None:
        """Free unused memory, so that one measurement's leftovers do not make another run out of it."""
        if self.on_gpu:
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def matrix_rate(self, dtype: torch.dtype) -> float:
        """FLOP/s of a square product of random matrices of this type, 8192 on a GPU, 1024 on a CPU; float32 without TF32."""
        size = 8192 if self.on_gpu else 1024
        left, right = (torch.randn(size, size, device=self.device, dtype=dtype) for _ in range(2))
        with _without_tf32():
            return 2.0 * size**3 / (self.measure(lambda: left @ right, graph=False).device * 1e-3)

    def copy_rate(self) -> float:
        """Bytes a second of a large copy, read and written counted."""
        source = torch.ones((1 << 30 if self.on_gpu else 1 << 26) // 4, device=self.device)
        target = torch.empty_like(source)
        return 2.0 * source.numel() * 4 / (self.measure(lambda: target.copy_(source), graph=False).device * 1e-3)

    def _wall_times(self, call: Callable[[], Any]) -> list[float]:
        times: list[float] = []
        end = time.perf_counter() + self.seconds
        while len(times) < _FEWEST or (len(times) < self.repeats and time.perf_counter() < end):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        return times

    def _event_times(self, call: Callable[[], Any]) -> tuple[float, float]:
        """Medians of the device's and of the host's time."""
        device_times: list[float] = []
        host_times: list[float] = []
        end = time.perf_counter() + self.seconds
        while len(device_times) < _FEWEST or (len(device_times) < self.repeats and time.perf_counter() < end):
            pairs = []
            for _ in range(_TOGETHER):
                if self._large is not None:
                    self._large.sum()
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                begun = time.perf_counter()
                call()
                host_times.append(1e3 * (time.perf_counter() - begun))
                stop.record()
                pairs.append((start, stop))
            torch.cuda.synchronize()
            device_times += [start.elapsed_time(stop) for start, stop in pairs]
        return statistics.median(device_times), statistics.median(host_times)

    def _capture(self, call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()
        graph.replay()
        torch.cuda.synchronize()
        return graph, result


def working_on(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Make this GPU the one whose events, graphs and memory a :class:`Clock` sees; nothing on a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, "ieee"
    try:
        yield
    finally:
        products.fp32_precision = before


def first_line(error: BaseException) -> str:
    """What went wrong in one short line: "out of memory" where it was that."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return "out of memory"
    return (text.strip().splitlines() or [type(error).__name__])[0][:120]
