"""Signals are noted from the start to the end."""

import os
import signal
import threading

import pytest

from smoe_hpc.launch import stopping
from smoe_hpc.launch.stopping import handle_stop_signals, ignore_until_exit, restore_sigterm, stop_requested


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_signal_is_noted_and_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with handle_stop_signals():
        assert stop_requested() == ""
        os.kill(os.getpid(), number)
        assert stop_requested() == number.name
    assert stop_requested() == ""
    assert signal.getsignal(number) is before


def test_what_came_early_is_seen_inside() -> None:
    with handle_stop_signals():
        os.kill(os.getpid(), signal.SIGUSR1)
        with handle_stop_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop_requested() == "SIGUSR1", "the first is the reason"
        assert stop_requested() == "SIGUSR1"


def test_another_handler_is_replaced_and_put_back() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
    try:
        with handle_stop_signals():
            os.kill(os.getpid(), signal.SIGUSR2)
        assert heard == []
        os.kill(os.getpid(), signal.SIGUSR2)
        assert heard == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_once_all_is_saved_sigterm_ends_the_process_again() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with handle_stop_signals():
        with handle_stop_signals():
            restore_sigterm()
            assert signal.getsignal(signal.SIGTERM) is before
        assert signal.getsignal(signal.SIGUSR1) is not signal.SIG_DFL, "a warning is no order"
    assert signal.getsignal(signal.SIGTERM) is before


def test_last_words_are_not_cut_off() -> None:
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    try:
        with handle_stop_signals():
            ignore_until_exit()
        assert all(signal.getsignal(number) is signal.SIG_IGN for number in stopping.SIGNALS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_another_thread_listens_to_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    found: list[object] = []

    def work() -> None:
        with handle_stop_signals():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]
