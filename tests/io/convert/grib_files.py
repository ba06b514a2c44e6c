"""GRIB files for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

eccodes = pytest.importorskip("eccodes")

LAT = np.array([53.0, 52.5, 52.0])  # north to south, as in the wild
LON = np.array([-1.0, -0.5, 0.0, 0.5])


def write_grib(path: Path, hours: list[int], parameters=(("2t", 280.0),), missing: tuple[int, int] | None = None, **keys):
    """A GRIB 1 file: value = start + hour + 0.1 * row + 0.01 * column, row and column counted as in the file."""
    with path.open("wb") as file:
        for hour in hours:
            for name, start in parameters:
                message = eccodes.codes_grib_new_from_samples("regular_ll_sfc_grib1")
                settings = {
                    "Ni": 4,
                    "Nj": 3,
                    "latitudeOfFirstGridPointInDegrees": LAT[0],
                    "latitudeOfLastGridPointInDegrees": LAT[-1],
                    "longitudeOfFirstGridPointInDegrees": LON[0],
                    "longitudeOfLastGridPointInDegrees": LON[-1],
                    "iDirectionIncrementInDegrees": 0.5,
                    "jDirectionIncrementInDegrees": 0.5,
                    "dataDate": 20190301 + hour // 24,
                    "dataTime": 100 * (hour % 24),
                    "shortName": name,
                    "bitsPerValue": 24,
                    "bitmapPresent": int(missing is not None),
                    "missingValue": 9999,
                    **keys,
                }
                for key, value in settings.items():
                    eccodes.codes_set(message, key, value)
                values = start + hour + 0.1 * np.arange(3)[:, None] + 0.01 * np.arange(4)
                if missing is not None and missing[0] == hour:
                    values.flat[missing[1]] = 9999
                eccodes.codes_set_values(message, values.ravel())
                eccodes.codes_write(message, file)
                eccodes.codes_release(message)
    return path
