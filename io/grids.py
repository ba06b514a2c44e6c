"""The points that the fields stand on.

A grid travels with every store, gate and checkpoint, because a map learned on one grid means nothing on another. Rows
run from south to north and columns from west to east. Longitudes are 0..360; a regional grid that crosses Greenwich
goes on past 360 (10W..2E is 350..362), so that columns which are neighbours on the Earth are neighbours in memory.

Dimensions: H latitude rows, W longitude columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from smoe_hpc.errors import DataError

KINDS = ("latlon", "plane")


@dataclass(frozen=True, eq=False)
class Grid:
    """Rows and columns of a field, checked.

    Args:
        kind: ``"latlon"`` (degrees) or ``"plane"`` (row and column numbers of a flat domain).
        lat: [H] degrees north, strictly ascending, within -90..90; the row numbers of a plane.
        lon: [W] degrees east, evenly spaced, ascending, starting in [0, 360) and spanning less than a full turn; a grid
            that goes all the way round stays within [0, 360). The column numbers of a plane.

    Raises:
        DataError: the first rule that is broken, with the remedy.
    """

    kind: str
    lat: np.ndarray
    lon: np.ndarray

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DataError(f"grid kind {self.kind!r} is unknown; it is one of {', '.join(KINDS)}")
        for name in ("lat", "lon"):
            values = np.array(getattr(self, name), dtype=np.float64)
            values.setflags(write=False)
            object.__setattr__(self, name, values)
            if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
                raise DataError(f"grid.{name} has shape {values.shape}; it must be one non-empty row of finite numbers")
        if self.kind == "latlon":
            self._check_degrees()
        elif not (_is_count(self.lat) and _is_count(self.lon)):
            raise DataError("a plane's rows and columns are numbered 0, 1, 2, ...; use Grid.plane(H, W)")

    def _check_degrees(self) -> None:
        lat, lon = self.lat, self.lon
        if not (np.diff(lat) > 0).all():
            raise DataError(
                f"latitudes run from {lat[0]:g} to {lat[-1]:g} but must strictly ascend (south to north); "
                "flip the rows of the fields and of lat together"
            )
        if lat[0] < -90.001 or lat[-1] > 90.001:
            raise DataError(f"latitudes {lat[0]:g}..{lat[-1]:g} leave -90..90 degrees")
        steps = np.diff(lon)
        if not (steps > 0).all() or (len(steps) and np.abs(steps - steps.mean()).max() > 1e-2 * steps.mean()):
            raise DataError(
                f"longitudes {lon[0]:g}..{lon[-1]:g} must ascend in even steps (west to east); roll the columns so "
                "that neighbours stand side by side, past 360 where a region crosses Greenwich"
            )
        if not 0 <= lon[0] < 360 or lon[-1] - lon[0] > 360 - 0.5 * self._spacing():
            raise DataError(
                f"longitudes {lon[0]:g}..{lon[-1]:g} must start in [0, 360) and span less than a full turn; add 360 to "
                "negative longitudes and drop a repeated column"
            )
        if self.periodic and lon[-1] >= 360:
            raise DataError(f"a grid that goes all the way round must lie in [0, 360), not {lon[0]:g}..{lon[-1]:g}")

    @classmethod
    def plane(cls, height: int, width: int) -> Grid:
        """A flat domain of [H, W] cells.

        >>> Grid.plane(2, 3).shape
        (2, 3)
        """
        return cls("plane", np.arange(height), np.arange(width))

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W)."""
        return len(self.lat), len(self.lon)

    @property
    def periodic(self) -> bool:
        """Whether the last column is the western neighbour of the first.

        >>> Grid("latlon", [-45, 45], [0, 90, 180, 270]).periodic
        True
        >>> Grid("latlon", [50, 51], [350, 356, 362]).periodic
        False
        """
        spacing = self._spacing()
        return self.kind == "latlon" and spacing > 0 and abs(len(self.lon) * spacing - 360) < 0.5 * spacing

    def _spacing(self) -> float:
        return float(np.diff(self.lon).mean()) if len(self.lon) > 1 else 0.0

    def cos_latitude_weights(self) -> np.ndarray:
        """[H, W] float64: cos(latitude) divided by its mean, ones on a plane (Rasp and Thuerey 2021).

        >>> Grid("latlon", [-60, 0, 60], [0, 120, 240]).cos_latitude_weights()[:, 0].round(2)
        array([0.75, 1.5 , 0.75])
        """
        if self.kind == "plane":
            return np.ones(self.shape)
        rows = np.cos(np.deg2rad(self.lat)).clip(min=0.0)
        return np.repeat((rows / rows.mean())[:, None], len(self.lon), axis=1)

    def same_as(self, other: Grid) -> bool:
        """Whether both are the same points, to a thousandth of the spacing (files round coordinates differently)."""
        if self.kind != other.kind or self.shape != other.shape:
            return False
        return _close(self.lat, other.lat) and _close(self.lon, other.lon)

    def require_same(self, other: Grid, what: str) -> None:
        """Raise unless ``other``, the grid of ``what``, is this one.

        Raises:
            DataError: names both grids and how they differ.
        """
        if self.same_as(other):
            return
        how = "the shapes differ" if self.shape != other.shape else "the points differ"
        if self.kind == other.kind and self.shape == other.shape and _close(self.lat, other.lat):
            how = f"the columns are shifted by {other.lon[0] - self.lon[0]:g} degrees"
        raise DataError(
            f"{what} stands on another grid ({how}): {other.describe()}, expected {self.describe()}; "
            "bring it to the expected grid first, or take data that are all on one"
        )

    def describe(self) -> str:
        """One line for people.

        >>> Grid.plane(64, 64).describe()
        '64 x 64 plane'
        >>> Grid("latlon", [50, 50.25, 50.5], [350, 350.25]).describe()
        '3 x 2 latlon, lat 50..50.5, lon 350..350.25, regional'
        """
        height, width = self.shape
        if self.kind == "plane":
            return f"{height} x {width} plane"
        extent = "round the Earth" if self.periodic else "regional"
        lat, lon = self.lat, self.lon
        return f"{height} x {width} latlon, lat {lat[0]:g}..{lat[-1]:g}, lon {lon[0]:g}..{lon[-1]:g}, {extent}"


def _is_count(values: np.ndarray) -> bool:
    return bool(np.array_equal(values, np.arange(len(values))))


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    spacing = float(np.diff(a).min()) if len(a) > 1 else 1.0
    return bool(np.abs(a - b).max() <= 1e-3 * spacing)
