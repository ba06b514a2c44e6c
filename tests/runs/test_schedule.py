from __future__ import annotations

from smoe_hpc.config import Schedule
from smoe_hpc.runs.schedule import Plateau


def after(scores: list[float], schedule: Schedule, mode: str = "max") -> Plateau:
    state = Plateau()
    for step, score in enumerate(scores, 1):
        state = state.after(score, step, schedule, lr=1e-2, mode=mode)  # type: ignore[arg-type]
    return state


def test_the_rate_falls_after_patience_flat_validations_and_again_after_as_many() -> None:
    rule = Schedule(factor=0.1, patience=2)
    scales = [after([5.0] * n, rule).scale for n in range(1, 7)]
    #               best, flat, flat: x 0.1, flat, flat: x 0.1, flat
    assert scales == [1.0, 1.0, 0.1, 0.1, 0.1 * 0.1, 0.1 * 0.1]


def test_an_improvement_starts_the_count_anew() -> None:
    assert after([5.0, 5.0, 6.0, 6.0], Schedule(factor=0.1, patience=2)).scale == 1.0
    assert after([5.0, 5.0, 4.0, 4.0], Schedule(factor=0.1, patience=2), mode="min").scale == 1.0


def test_the_rate_has_a_floor() -> None:
    assert after([5.0] * 9, Schedule(factor=0.1, patience=1, min_lr=1e-3)).scale == 0.1


def test_a_small_gain_is_no_improvement_but_it_is_the_best() -> None:
    state = after([5.0, 5.05], Schedule(patience=3, min_delta=0.1))
    assert (state.since_improvement, state.best, state.best_step) == (1, 5.05, 2)


def test_of_equal_scores_the_first_is_best() -> None:
    assert after([5.0, 5.0], Schedule()).best_step == 1


def test_early_stop_and_target() -> None:
    rule = Schedule(early_stop=2)
    assert [after([5.0] * n, rule).stop(rule) for n in (2, 3)] == [False, True]
    assert not after([5.0] * 9, Schedule(early_stop=None)).stop(Schedule(early_stop=None))
    assert after([1.0, 9.0, 2.0], rule).reached(9.0, "max")
    assert not after([1.0, 9.0, 2.0], rule).reached(9.5, "max")
    assert after([1.0, 9.0], rule, "min").reached(1.0, "min")
    assert not after([1.0], rule).reached(None, "min")
