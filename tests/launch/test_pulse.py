"""Signs of life of several ranks, each with connections of its own to one store, in one process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist

from smoe_hpc.errors import LaunchError
from smoe_hpc.launch.interfaces import listening_socket
from smoe_hpc.launch.patience import Patience
from smoe_hpc.launch.pulse import Pulse

SHORT = Patience(beat=0.1, wait=1.0, nccl=2.0, heartbeat=3.0)


def connect(port: int, **served: int) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", port, timeout=timedelta(seconds=20), wait_for_workers=False, **served)


@pytest.fixture
def three() -> Iterator[list[Pulse]]:
    listening = listening_socket("127.0.0.1", 0, several_hosts=False)
    port = listening.getsockname()[1]
    server = connect(port, is_master=True, master_listen_fd=listening.detach())
    pulses = [Pulse(connect(port), server, rank, 3, "rank 0", SHORT, watch=False) for rank in range(3)]
    yield pulses
    for pulse in pulses:
        pulse.end()


def in_gradients(pulses: list[Pulse], step: int = 7) -> None:
    for pulse in pulses:
        pulse.step = step
        with pytest.raises(RuntimeError), pulse.at("all_reduce (gradients)"):
            raise RuntimeError


def test_a_silent_rank_is_named_with_step_and_collective(three: list[Pulse]) -> None:
    in_gradients(three[:2])
    three[2].end()
    assert three[0].missing(broken=False) == (
        "rank 2 did not come to all_reduce (gradients) of step 7 within 1 s and gives no sign of life (stopped, or its node is "
        "gone); the others waited there"
    )
    assert three[1].missing(broken=True).startswith("rank 2 ended without a word (killed")


def test_a_rank_that_lives_is_told_from_a_silent_one(three: list[Pulse]) -> None:
    in_gradients(three[:2])
    three[2].step = 6
    assert three[0].missing(broken=False) == (
        "rank 2 did not come to all_reduce (gradients) of step 7 within 1 s: it lives, and is at step 6; set SMOE_TIMEOUT to "
        "more seconds if that may take longer"
    )
    in_gradients(three[2:])
    assert "did not end within 1 s, though all processes came to it" in three[0].missing(broken=False)


def test_of_nested_names_the_outer_one_counts(three: list[Pulse]) -> None:
    with three[0].at("all_reduce (losses)"):
        with three[0].at("all_reduce (sums)"):
            assert three[0].where() == "all_reduce (losses)"
        assert three[0].where() == "all_reduce (losses)"
    assert three[0].where() == ""


def test_a_meeting_waits_for_who_lives_and_not_for_who_is_silent(three: list[Pulse]) -> None:
    met: list[int] = []
    waiting = [threading.Thread(target=lambda n=n: (three[n].meet(), met.append(n))) for n in range(2)]
    for thread in waiting:
        thread.start()
    waiting[0].join(3 * SHORT.wait)
    assert met == [], "rank 2 lives, and is waited for beyond the time-out"
    three[2].meet()
    for thread in waiting:
        thread.join()
    assert sorted(met) == [0, 1]
    three[2].end()
    with pytest.raises(LaunchError, match="rank 2 has given no sign of life for 1 s"):
        three[0].meet()


def test_where_nothing_else_can_the_thread_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    left = threading.Event()
    monkeypatch.setattr(Pulse, "_leave", lambda pulse: left.set())
    store = dist.HashStore()
    pulse = Pulse(store, store, 0, 1, "rank 0", Patience(beat=0.05, wait=0.2, nccl=1, heartbeat=2), watch=True)
    assert not left.wait(0.6), "in no collective"
    with pulse.at("all_reduce (losses)"):
        assert left.wait(20)
    pulse.end()
