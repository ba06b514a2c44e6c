import numpy as np
import pytest

from smoe_hpc.errors import DataError
from smoe_hpc.io import Grid


def globe(height: int, width: int) -> Grid:
    step = 180 / height
    return Grid("latlon", -90 + step * (np.arange(height) + 0.5), np.arange(width) * 360 / width)


def test_weights_are_the_cosine_with_mean_one():
    grid = globe(32, 64)
    weights = grid.cos_latitude_weights()
    assert weights.shape == (32, 64)
    assert weights.mean() == pytest.approx(1, abs=1e-14)
    assert weights[3, 0] / weights[20, 5] == pytest.approx(
        np.cos(np.deg2rad(grid.lat[3])) / np.cos(np.deg2rad(grid.lat[20]))
    )
    assert (Grid.plane(3, 4).cos_latitude_weights() == 1).all()


def test_poles_weigh_nothing_and_never_less():
    weights = Grid("latlon", [-90, 0, 90], [0, 120, 240]).cos_latitude_weights()
    assert weights.min() >= 0
    assert weights[0, 0] < 1e-15


def test_only_a_whole_turn_is_periodic():
    assert globe(32, 64).periodic
    assert not Grid("latlon", [50, 51], np.arange(350, 362.1, 0.25)).periodic
    assert not Grid.plane(4, 4).periodic


@pytest.mark.parametrize(
    ("lat", "lon", "message"),
    [
        ([51, 50], [0, 1], "must strictly ascend"),
        ([50, 51, 51], [0, 1], "must strictly ascend"),
        ([50, 95], [0, 1], "leave -90..90"),
        ([50, 51], [-10, -9], "add 360"),
        ([50, 51], [1, 0], "even steps"),
        ([50, 51], [0, 1, 359], "even steps"),
        (np.arange(3), np.arange(0, 361, 1.0), "less than a full turn"),
        (np.arange(3), np.arange(10, 370, 1.0), r"lie in \[0, 360\)"),
        ([50, np.nan], [0, 1], "finite numbers"),
        ([], [0, 1], "non-empty"),
    ],
)
def test_impossible_points_are_refused(lat, lon, message):
    with pytest.raises(DataError, match=message):
        Grid("latlon", lat, lon)


def test_unknown_kind_and_renumbered_plane_are_refused():
    with pytest.raises(DataError, match="unknown; it is one of latlon, plane"):
        Grid("gaussian", [0], [0])
    with pytest.raises(DataError, match="numbered 0, 1, 2"):
        Grid("plane", [1, 2], [0, 1])


def test_same_points_despite_rounding_and_nothing_else():
    grid = globe(32, 64)
    rounded = Grid("latlon", grid.lat.astype(np.float32), grid.lon.astype(np.float32))
    assert grid.same_as(rounded)
    shifted = Grid("latlon", grid.lat, grid.lon + 2.8125)
    assert not grid.same_as(shifted)
    with pytest.raises(DataError, match=r"the checkpoint stands on another grid .*shifted by 2.8125"):
        grid.require_same(shifted, "the checkpoint")
    with pytest.raises(DataError, match=r"the shapes differ.*64 x 128"):
        grid.require_same(globe(64, 128), "the checkpoint")
    with pytest.raises(DataError, match="the points differ"):
        grid.require_same(Grid.plane(32, 64), "the checkpoint")
    grid.require_same(rounded, "itself")
