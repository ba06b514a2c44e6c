import numpy as np
import pytest

from smoe_hpc.errors import DataError
from smoe_hpc.io.sampling.gaps import refuse_gaps
from smoe_hpc.io.sampling.splits import Split
from smoe_hpc.io.sampling.windows import Window, sample_rows

HOUR = np.timedelta64(1, "h")
START = np.datetime64("2016-12-31T00")


def every_6_hours(*steps: int) -> dict[str, np.ndarray]:
    return {"time": START + 6 * np.array(steps) * HOUR}


def test_a_gap_is_never_crossed():
    # row      0  1  2  3     4  5  6
    # 6 h step 0  1  2  3  .  5  6  7      step 4 is missing
    # starts:  1 (0, 1 -> 3)   2 wants 4: no   3 (2, 3 -> 5): yes   5 wants 4: no   6 wants 8: no
    inputs, targets = sample_rows(every_6_hours(0, 1, 2, 3, 5, 6, 7), Window(inputs=(-6, 0), leads=12))
    assert inputs.tolist() == [[0, 1], [2, 3]]
    assert targets.ravel().tolist() == [3, 4]


def test_a_run_is_never_left():
    # row   0  1  2  3   4  5  6     7  8
    # run   0  0  0  0   1  1  1     7  7
    # step  0  1  2  3   0  1  2     4  5     run 7 goes on where run 0 might have
    coords = {"run": np.array([0, 0, 0, 0, 1, 1, 1, 7, 7]), "step": np.array([0, 1, 2, 3, 0, 1, 2, 4, 5])}
    inputs, targets = sample_rows(coords, Window(inputs=(0,), leads=1))
    assert inputs.ravel().tolist() == [0, 1, 2, 4, 5, 7]
    assert targets.ravel().tolist() == [1, 2, 3, 5, 6, 8]
    inputs, targets = sample_rows(coords, Window(inputs=(-1, 0), leads=1))
    assert inputs.tolist() == [[0, 1], [1, 2], [4, 5]]


def slow_rows(keys: list[tuple[int, int]], window: Window, inside: list[bool]) -> list[tuple[list[int], int]]:
    """The same, written so that nobody can doubt it; keys are (run, place in it)."""
    row = {key: i for i, key in enumerate(keys)}
    found = []
    for run, place in keys:
        needed = [row.get((run, place + offset)) for offset in (*window.inputs, window.lead)]
        if all(r is not None and inside[r] for r in needed):
            found.append(([int(r) for r in needed[:-1]], int(needed[-1])))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("seed", range(30))
def test_times_equal_the_slow_way(seed):
    rng = np.random.default_rng(seed)
    hours = 6 * np.sort(rng.choice(80, size=55, replace=False))
    window = Window(inputs=(*sorted(rng.choice([-18, -12, -6], 2, replace=False)), 0), leads=int(rng.choice([6, 24])))
    split = Split("2016-12-31/2017-01-15") if seed % 2 else None
    inside = [seed % 2 == 0 or bool(START + h * HOUR < np.datetime64("2017-01-16")) for h in hours]
    expected = slow_rows([(0, int(h)) for h in hours], window, inside)
    if not expected:
        pytest.skip("no sample in this draw")
    inputs, targets = sample_rows({"time": START + hours * HOUR}, window, split)
    assert list(zip(inputs.tolist(), targets.ravel().tolist(), strict=True)) == expected


@pytest.mark.parametrize("seed", range(30))
def test_runs_equal_the_slow_way(seed):
    rng = np.random.default_rng(seed)
    keys = sorted({(int(r), int(s)) for r, s in zip(rng.integers(0, 5, 60), rng.integers(0, 12, 60), strict=True)})
    window = Window(inputs=(-2, 0) if seed % 3 else (0,), leads=int(rng.integers(1, 4)))
    inside = [run in (1, 2, 4) for run, _ in keys]
    expected = slow_rows(keys, window, inside)
    if not expected:
        pytest.skip("no sample in this draw")
    run, step = (np.array(part) for part in zip(*keys, strict=True))
    inputs, targets = sample_rows({"run": run, "step": step}, window, Split("1:3,4:5"))
    assert list(zip(inputs.tolist(), targets.ravel().tolist(), strict=True)) == expected


def test_dates_are_inclusive_and_splits_share_no_field():
    coords = {"time": np.datetime64("2019-03-01T00") + np.arange(31 * 24) * HOUR}
    window = Window(inputs=(-12, -6, 0), leads=6)
    used = []
    for text, days in (("2019-03-01/2019-03-23", 23), ("2019-03-24/2019-03-26", 3), ("2019-03-27/2019-03-31", 5)):
        inputs, targets = sample_rows(coords, window, Split(text))
        assert len(targets) == days * 24 - 18
        used.append({*inputs.ravel().tolist(), *targets.ravel().tolist()})
    assert max(used[0]) == 23 * 24 - 1
    assert not used[0] & used[1]
    assert not used[1] & used[2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1000", "not understood"),
        ("5:5", "ends before it starts"),
        ("2019-03-23/2019-03-01", "ends before it starts"),
        ("2019-03-01T06/2019-03-02", "not understood"),
        ("0:3,2019-03-01/2019-03-02", "mixes runs and dates"),
        ("2019-02-30/2019-03-02", "not understood"),
    ],
)
def test_impossible_splits_are_refused(text, message):
    with pytest.raises(DataError, match=message):
        Split(text)


def test_a_split_of_the_other_kind_and_an_empty_one_are_refused():
    runs = {"run": np.zeros(3, int), "step": np.arange(3)}
    with pytest.raises(DataError, match="goes by time but the store has run, step"):
        sample_rows(runs, Window((0,), 1), Split("2019-03-01/2019-03-02"))
    with pytest.raises(DataError, match="goes by run but the store has time"):
        sample_rows(every_6_hours(0, 1), Window((0,), 6), Split("0:1"))
    with pytest.raises(DataError, match="no sample: split '0:1' of 3 fields"):
        sample_rows(runs, Window((0,), 5), Split("0:1"))
    with pytest.raises(DataError, match="no sample: 2 fields"):
        sample_rows(every_6_hours(0, 1), Window((0,), 5))
    with pytest.raises(DataError, match=r"every 6 h, of which -3, 7 h .* are no multiples; give multiples"):
        sample_rows(every_6_hours(0, 1, 2), Window((-3, 0), (6, 7)))
    message = r"of 8 fields .* and of 2 days never holds a whole window, from 12 h before the start to 72 h after it; give"
    with pytest.raises(DataError, match=message):
        sample_rows(every_6_hours(*range(8)), Window((-12, 0), 72), Split("2016-12-31/2017-01-01"))
    with pytest.raises(DataError, match="strictly ascend"):
        sample_rows(every_6_hours(1, 0), Window((0,), 6))
    with pytest.raises(DataError, match="windows need time, or run and step"):
        sample_rows({"member": np.arange(3)}, Window((0,), 6))


@pytest.mark.parametrize("text", ["0:5000", "40:50", "39:41", "0:40,40:41", "3:4,7:8,50:60"])
def test_runs_that_are_not_stored_are_refused(text):
    coords = {"run": np.repeat(np.arange(40), 3), "step": np.tile(np.arange(3), 40)}
    message = f"split '{text}': runs .* are not all stored; the store has 0:40; give runs within"
    with pytest.raises(DataError, match=message) as caught:
        sample_rows(coords, Window((0,), 1), Split(text))
    assert "\n" not in str(caught.value), "one line"


@pytest.mark.parametrize(("text", "samples"), [("0:40", 80), ("39:40", 2), ("0:1,39:40", 4)])
def test_the_first_and_the_last_run_may_be_asked_for(text, samples):
    coords = {"run": np.repeat(np.arange(40), 3), "step": np.tile(np.arange(3), 40)}
    assert len(sample_rows(coords, Window((0,), 1), Split(text))[1]) == samples
    assert len(sample_rows(coords, Window((0,), 1), None)[1]) == 80


def test_the_runs_there_are_stay_short():
    coords = {"run": np.arange(0, 60, 2), "step": np.zeros(30, int)}
    with pytest.raises(DataError, match=r"the store has 0:1,2:3,4:5,\.\.\.,56:57,58:59; give runs within"):
        Split("0:2").mask(coords)
    with pytest.raises(DataError, match="the store has no run"):
        Split("0:2").mask({"run": np.zeros(0, int), "step": np.zeros(0, int)})


def test_dates_must_meet_the_store_and_need_not_fill_it():
    coords = every_6_hours(*range(8))  # 31 December 2016 and 1 January 2017
    assert Split("2016-01-01/2016-12-31").mask(coords).sum() == 4
    for text in ("2017-01-02/2017-02-01", "2016-12-31/2016-12-31,2017-01-02/2017-02-01"):
        with pytest.raises(DataError, match=r"2017-01-02/2017-02-01 holds no field; the store has 8 fields \(time 2016-12-31"):
            Split(text).mask(coords)


@pytest.mark.parametrize(
    ("inputs", "leads"),
    [((), 6), ((0, -6), 6), ((-6, 6), 12), ((0, 0), 6), ((0,), 0), ((0,), -6), ((0,), ()), ((0,), (24, 6)), ((0,), (6, 6))],
)
def test_impossible_windows_are_refused(inputs, leads):
    with pytest.raises(DataError, match="window"):
        Window(inputs, leads)


def test_one_lead_is_a_number_or_a_tuple():
    assert Window((0,), 6) == Window((0,), (6,)) == Window((0,), np.int64(6))
    assert Window((0,), 6).lead == 6
    with pytest.raises(DataError, match="has 2 leads"):
        _ = Window((0,), (6, 12)).lead
    with pytest.raises(DataError, match="choose stacked, drawn or each"):
        Window((0,), 6, "some")  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(10))
def test_several_leads_are_where_each_of_them_alone_would_be(seed):
    rng = np.random.default_rng(seed)
    coords = every_6_hours(*np.sort(rng.choice(80, size=60, replace=False)))
    inputs, targets = sample_rows(coords, Window((-6, 0), (6, 24)))
    alone = []
    for lead in (6, 24):
        starts, target = sample_rows(coords, Window((-6, 0), lead))
        alone.append(dict(zip(starts[:, -1].tolist(), target[:, 0].tolist(), strict=True)))
    both = sorted(set(alone[0]) & set(alone[1]))  # starts for which every lead is stored
    assert inputs[:, -1].tolist() == both
    assert targets.tolist() == [[alone[0][start], alone[1][start]] for start in both]


def row_name(row: int) -> str:
    return f"file.h5 row {row}"


def test_a_hole_is_refused_and_named():
    refuse_gaps(every_6_hours(*range(8)), None, row_name)
    coords = every_6_hours(0, 1, 2, 3, 6, 7, 9)  # 4, 5 and 8 are missing
    message = r"3 times are missing, the first between file.h5 row 3 and file.h5 row 4, where fields lie 6 h apart; .*gaps=skip"
    with pytest.raises(DataError, match=message):
        refuse_gaps(coords, None, row_name)
    refuse_gaps(coords, Split("2016-12-31/2016-12-31"), row_name)  # 0 to 3: the hole lies outside


def test_what_lies_between_parts_of_a_split_or_runs_is_no_hole():
    coords = every_6_hours(*range(4), *range(12, 16))  # 31 December and 3 January
    refuse_gaps(coords, Split("2016-12-31/2016-12-31,2017-01-03/2017-01-03"), row_name)
    with pytest.raises(DataError, match="8 times are missing"):
        refuse_gaps(coords, Split("2016-12-31/2017-01-03"), row_name)
    runs = {"run": np.array([0, 0, 0, 1, 1, 3, 3]), "step": np.array([0, 1, 2, 5, 6, 0, 1])}
    refuse_gaps(runs, None, row_name)
    runs["step"][2] = 3
    with pytest.raises(DataError, match=r"1 steps are missing, the first between file.h5 row 1 and file.h5 row 2"):
        refuse_gaps(runs, Split("0:2,3:4"), row_name)
