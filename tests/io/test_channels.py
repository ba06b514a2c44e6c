import numpy as np
import pytest

from smoe_hpc.errors import DataError
from smoe_hpc.io.channels import CONSTANT_UNITS, CONSTANTS, LEVELS, RT38, Channel, channels_of, known_channel
from smoe_hpc.io.store.encoding import Encoding
from smoe_hpc.io.store.transforms import apply

# Values that a reanalysis reaches or nearly reaches, from general knowledge of the atmosphere, not from a data set.
EXTREMES = {
    "z50": (176000, 209000),  # a deep polar vortex, a summer pole
    "z250": (88000, 111000),
    "z500": (44000, 60000),
    "z700": (20000, 33500),
    "z850": (4500, 17500),  # a cyclone of 920 hPa, a strong high
    "z925": (-2500, 11500),
    "t50": (178, 265),  # the Antarctic winter, a sudden warming
    "t250": (190, 255),
    "t500": (213, 283),
    "t850": (205, 318),
    "t925": (205, 325),  # continued below hot high ground
    "u50": (-75, 130),
    "u250": (-80, 125),
    "u850": (-80, 80),  # tropical cyclones
    "v250": (-110, 110),
    "v925": (-80, 80),
    "q50": (-1e-6, 1e-5),
    "q500": (-2e-4, 0.012),
    "q925": (-5e-4, 0.03),
    "tisr": (0, 6 * 4.6e6),  # six hours around noon
    "t2m": (180, 335),
}
# Standard deviations over space and time, to about a third; precipitation after its transform.
SPREADS = {"z": 2000, "t": 8, "u": 8, "v": 5, "q": 5e-4, "tisr": 1.4e6, "t2m": 20, "tp": 0.4, "q50": 3e-7, "q250": 2e-5}


def test_the_channels_are_those_of_the_paper_in_their_order():
    names = [channel.name for channel in RT38]
    assert len(names) == len(set(names)) == 38
    assert names[:7] == ["z50", "z250", "z500", "z600", "z700", "z850", "z925"]
    assert [name.rstrip("0123456789") for name in names[:35:7]] == ["z", "t", "u", "v", "q"]
    assert all(name.endswith(str(level)) for name, level in zip(names[:35], LEVELS * 5, strict=True))
    assert names[35:] == ["tisr", "t2m", "tp"]
    assert [channel.units for channel in RT38[::7]] == ["m2 s-2", "K", "m s-1", "m s-1", "kg kg-1", "J m-2"]
    assert [channel.transform for channel in RT38] == ["none"] * 37 + ["log:0.001"]
    assert CONSTANTS == tuple(CONSTANT_UNITS) == ("land_sea_mask", "orography", "latitude")


@pytest.mark.parametrize("name", EXTREMES)
def test_bounds_hold_extremes_with_a_margin(name):
    low, high = EXTREMES[name]
    channel = known_channel(name)
    margin = 0.02 * (channel.high - channel.low) if name != "tisr" else 0
    assert channel.low + margin <= low < high <= channel.high - margin


def test_bounds_of_precipitation_are_after_the_transform():
    channel = known_channel("tp")
    low, high = apply(channel.transform, np.array([-5e-5, 0.8]))  # interpolation leaves slightly negative amounts
    assert channel.low < low < high < channel.high


@pytest.mark.parametrize("channel", RT38, ids=lambda channel: channel.name)
def test_a_step_of_int16_is_small_beside_the_weather(channel):
    spread = SPREADS.get(channel.name) or SPREADS[channel.name.rstrip("0123456789")]
    (step,) = Encoding.of_bounds("int16", [channel.low], [channel.high]).scale
    assert step / np.sqrt(12) < 0.002 * spread


def test_unknown_names_are_told_or_left_to_the_caller():
    assert channels_of("rt38") is RT38
    with pytest.raises(DataError, match=r"no set of channels 'rt83'; did you mean 'rt38'"):
        channels_of("rt83")
    assert known_channel("heat") is None
    with pytest.raises(DataError, match="low must be below high"):
        Channel("x", "1", 1.0, 1.0)
