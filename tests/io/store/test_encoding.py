"""Numbers in 16 bits: as fine as promised over the whole range of real channels, and never clipped."""

import numpy as np
import pytest

from smoe_hpc.errors import DataError
from smoe_hpc.io import Encoding, Grid, Store, StoreWriter
from smoe_hpc.io.channels import RT38
from smoe_hpc.io.store.transforms import apply, check_transforms, slope, undo

from ..conftest import hourly

PACKED = ("float16", "int16")
NAMES = [channel.name for channel in RT38]
LOW, HIGH = (np.array([getattr(channel, name) for channel in RT38]) for name in ("low", "high"))
TYPICAL = {"z50": 200_000.0, "z500": 55_000.0, "t850": 280.0, "u250": -60.0, "q850": 0.006, "tisr": 1.2e6, "t2m": 288.0}


def fields_between(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """[6, C, 4, 5] in stored space, from the lowest to the highest."""
    share = np.linspace(0, 1, 120).reshape(6, 1, 4, 5)
    return low[:, None, None] + (high - low)[:, None, None] * share


@pytest.mark.parametrize(("dtype", "worst"), [("int16", 0.5 / 65532), ("float16", 2.0**-12)])
def test_every_real_channel_keeps_its_range_and_its_fineness(dtype, worst):
    encoding = Encoding.of_bounds(dtype, LOW, HIGH)
    values = fields_between(LOW, HIGH)
    stored = encoding.encode(values)
    assert stored.dtype == encoding.stored_type
    assert stored.nbytes == values.size * 2
    error = np.abs(encoding.decode(stored) - values).max(axis=(0, 2, 3)) / (HIGH - LOW)
    rounding_of_float32 = 1e-7 * np.maximum(np.abs(LOW), np.abs(HIGH)) / (HIGH - LOW)
    assert (error <= worst * 1.001 + rounding_of_float32).all(), dict(zip(NAMES, error, strict=True))


@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("end", [-1, 1])
@pytest.mark.parametrize("name", ["z50", "z925", "u250", "q850", "tisr", "t2m", "tp"])
def test_what_does_not_fit_is_refused_at_both_ends_and_never_clipped(dtype, end, name):
    place = NAMES.index(name)
    encoding = Encoding.of_bounds(dtype, LOW, HIGH).select([place])
    values = np.full((3, 1, 4, 5), 0.5 * (LOW + HIGH)[place])
    edge = (encoding.low if end < 0 else encoding.high)[0]
    beyond = edge + end * 0.001 * (HIGH - LOW)[place]
    values[1, 0, 2, 3] = edge
    encoding.encode(values)
    values[1, 0, 2, 3] = beyond
    with pytest.raises(DataError, match=r"sample 1, channel 0, row 2, column 3: .* is outside .*nothing is clipped"):
        encoding.encode(values)


def test_raw_values_would_overflow_but_bounds_hold_them():
    raw = Encoding("float16", np.ones(1), np.zeros(1))
    field = np.full((1, 1, 2, 2), TYPICAL["z50"])
    with pytest.raises(DataError, match=r"200000 is outside -65504\.\.65504"):
        raw.encode(field)
    for dtype in PACKED:
        packed = Encoding.of_bounds(dtype, LOW, HIGH)
        for name, value in TYPICAL.items():
            one = packed.select([NAMES.index(name)])
            width = (HIGH - LOW)[NAMES.index(name)]
            assert one.decode(one.encode(np.full((1, 1, 2, 2), value))) == pytest.approx(value, abs=3e-4 * width)


@pytest.mark.parametrize("dtype", PACKED)
def test_zero_stays_zero_where_it_is_within(dtype):
    encoding = Encoding.of_bounds(dtype, LOW, HIGH)
    within = [place for place in range(38) if LOW[place] <= 0 <= HIGH[place]]
    assert {"tp", "tisr", "u500", "q50"} <= {NAMES[place] for place in within}
    some = encoding.select(within)
    assert (some.decode(some.encode(np.zeros((1, len(within), 2, 2)))) == 0).all()


def test_decoding_rounds_once():
    encoding = Encoding.of_bounds("int16", [165e3], [215e3])
    stored = np.arange(-32767, 32768, dtype=np.int16)[:65000].reshape(1, 1, 250, 260)
    exact = stored.astype(np.float64) * encoding.scale[0] + encoding.offset[0]
    np.testing.assert_array_equal(encoding.decode(stored), exact.astype(np.float32))
    out = np.empty(stored.shape, np.float32)
    assert encoding.decode(stored, out) is out
    np.testing.assert_array_equal(encoding.encode(out), stored)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Encoding("int8", np.ones(1), np.zeros(1)), "'int8' is unknown; it is one of float32, float16, int16"),
        (lambda: Encoding("int16", np.zeros(1), np.zeros(1)), "scales must be positive"),
        (lambda: Encoding("int16", np.ones(1), np.full(1, np.nan)), "finite"),
        (lambda: Encoding("int16", np.ones(2), np.zeros(1)), "one number a channel each"),
        (lambda: Encoding.of_bounds("int16", [1.0], [1.0]), "the lower below the upper"),
        (lambda: check_transforms(["sqrt"], ["tp"]), "transform 'sqrt' is unknown; it is none, or log:AMOUNT"),
        (lambda: check_transforms(["log:-1"], ["tp"]), "log:AMOUNT"),
        (lambda: check_transforms([], ["tp"]), "one text a channel"),
    ],
)
def test_impossible_encodings_are_refused(make, message):
    with pytest.raises(DataError, match=message):
        make()


def test_precipitation_enters_as_the_logarithm_and_comes_back():
    rain = np.array([0.0, 1e-6, 0.001, 0.02, 0.9])
    stored = apply("log:0.001", rain)
    np.testing.assert_allclose(stored, np.log(rain + 0.001) - np.log(0.001), atol=1e-12)
    np.testing.assert_allclose(undo("log:0.001", stored), rain, rtol=1e-12, atol=1e-18)
    small = 1e-6
    by_difference = (undo("log:0.001", stored + small) - rain) / small
    np.testing.assert_allclose(slope("log:0.001", stored), by_difference, rtol=1e-4)


def write_channels(path, names, fields, **options):
    grid = Grid("latlon", [-45, 0, 45, 60], [0, 72, 144, 216, 288])
    with StoreWriter(path, grid, names, ["1"] * len(names), coords={"time": hourly(len(fields))}, **options) as writer:
        writer.write(0, fields)
    return Store(path)


@pytest.mark.parametrize("dtype", PACKED)
def test_a_store_of_known_channels_needs_no_bounds_and_no_transforms(tmp_path, dtype):
    stored_space = fields_between(LOW, HIGH)
    physical = np.stack([undo(c.transform, stored_space[:, i]) for i, c in enumerate(RT38)], axis=1)
    before = physical.astype(np.float32)
    given = before.copy()
    store = write_channels(tmp_path / "a.h5", NAMES, given, dtype=dtype)
    np.testing.assert_array_equal(given, before)  # the caller's memory stays as it is
    assert store.direct
    assert store.encoding.same_as(Encoding.of_bounds(dtype, LOW, HIGH))
    assert store.transforms == ["none"] * 37 + ["log:0.001"]
    for channels in (NAMES, ["tp", "z500"]):
        places = [NAMES.index(name) for name in channels]
        width = (HIGH - LOW)[places][:, None, None]
        found = store.read([5, 0, 2], channels)
        assert found.dtype == np.float32
        assert np.abs((found - stored_space[[5, 0, 2]][:, places]) / width).max() < 3e-4
        stored = store.read_stored([5, 0, 2], channels)
        np.testing.assert_array_equal(store.encoding.select(places).decode(stored), found)


def test_a_value_out_of_range_is_named_when_it_is_written(tmp_path):
    fields = np.full((2, 2, 4, 5), 250.0)
    fields[1, 1, 2, 3] = 400.0
    with pytest.raises(
        DataError, match=r"2019-03-01T01:00:00, channel 't2m', lat 45, lon 216: 400 is outside 16.*what int16 holds"
    ):
        write_channels(tmp_path / "a.h5", ["t850", "t2m"], fields, dtype="int16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["float32", *PACKED])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_in_every_type(tmp_path, dtype, bad):
    fields = np.zeros((2, 1, 4, 5))
    fields[1, 0, 3, 4] = bad
    with pytest.raises(DataError, match=r"T01:00:00, channel 'tp', lat 60, lon 288; a store holds whole fields: fill or drop"):
        write_channels(tmp_path / "a.h5", ["tp"], fields, dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_rain_below_the_start_of_the_logarithm_is_named(tmp_path):
    fields = np.zeros((2, 1, 4, 5))
    fields[1, 0, 0, 4] = -0.002
    with pytest.raises(DataError, match=r"lie below the start of the transform log:0\.001, the first at .*T01.*'tp', lat -45"):
        write_channels(tmp_path / "a.h5", ["tp"], fields, transforms=["log:0.001"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int16"}, "bounds of channel 'heat' are not known, which int16 needs"),
        ({"dtype": "float64"}, "stored type 'float64' is unknown; it is one of float32"),
        ({"encoding": Encoding.identity(2)}, "encoding is of 2 channels, the store has 1"),
        ({"dtype": "float16", "encoding": Encoding.of_bounds("int16", [0], [1])}, "contradict each other"),
        ({"transforms": ["none", "none"]}, "2 transforms for 1 channels"),
        ({"compression": "zip"}, "compression 'zip' is unknown; did you mean 'gzip'"),
    ],
)
def test_impossible_ways_to_store_are_refused(tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        write_channels(tmp_path / "a.h5", ["heat"], np.zeros((1, 1, 4, 5)), **options)


def test_known_bounds_are_of_the_known_transform(tmp_path):
    with pytest.raises(DataError, match=r"'tp' has known bounds after transform 'log:0\.001', not 'none'"):
        write_channels(tmp_path / "a.h5", ["tp"], np.zeros((1, 1, 4, 5)), dtype="int16", transforms=["none"])
