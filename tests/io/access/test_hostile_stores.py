"""HDF5 files from elsewhere: whatever leads out of the file, promises more than it holds or is no plain value is refused."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from smoe_hpc.errors import DataError
from smoe_hpc.io import Store, open_store
from smoe_hpc.io.checks.inspect import describe_store
from smoe_hpc.io.checks.verify import verify
from smoe_hpc.io.store.xarray_view import open_dataset

VARIABLES = ["fields", "time", "channel", "units", "scale", "offset", "transform", "lat", "lon"]
WAYS = (Store, open_store, describe_store, open_dataset)
CONSTANTS = ["constant", "constant_dtype", "constants"]


def refused(path: Path, words: str, ways: tuple[Callable[[Path], object], ...] = (Store,)) -> None:
    """Whoever opens the file is told in one line."""
    for open_it in ways:
        with pytest.raises(DataError, match=words) as caught:
            open_it(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


@pytest.fixture
def path(make_store) -> Path:
    store, _ = make_store(constants={"region": np.arange(20).reshape(4, 5)}, attributes={"sources": "x"})
    found: Path = store.path
    return found


@pytest.mark.parametrize("name", VARIABLES + CONSTANTS)
def test_links_are_not_followed(name, path, make_store, tmp_path):
    other, _ = make_store(name="other.h5", constants={"region": np.zeros((4, 5))})
    with h5py.File(path, "r+") as file:
        del file[name]
        file[name] = h5py.ExternalLink(str(other.path), name)
    refused(path, f"store.h5: '{name}' is a link to another file; a store holds plain values in its own file", WAYS)
    (unusable,) = verify(path).unusable
    assert "is a link to another file" in unusable
    with h5py.File(path, "r+") as file:
        del file[name]
        file["door"] = h5py.ExternalLink(str(other.path), "/")
        file[name] = h5py.SoftLink(f"/door/{name}")
    refused(path, "is a (link to another file|soft link)")
    with h5py.File(path, "r+") as file:
        del file["door"]
        del file[name]
        file[name] = h5py.SoftLink(f"/{name}")  # in circles
    refused(path, f"'{name}' is a soft link")


def test_a_link_to_what_hangs_is_not_followed(path, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with h5py.File(path, "r+") as file:
        file["more"] = h5py.ExternalLink("pipe", "/")
    refused(path, "'more' is a link to another file")


@pytest.mark.parametrize("name", VARIABLES + CONSTANTS)
def test_groups_and_types_are_no_datasets(name, path):
    with h5py.File(path, "r+") as file:
        del file[name]
        file.create_group(name)
    refused(path, f"'{name}' is a group, not a dataset")
    with h5py.File(path, "r+") as file:
        del file[name]
        file[name] = np.dtype("f4")
    refused(path, f"'{name}' is a datatype, not a dataset")


@pytest.mark.parametrize("name", ["fields", "time", "lat", "scale", "constants"])
def test_values_of_other_files_are_not_read(name, path, tmp_path):
    with h5py.File(path, "r+") as file:
        shape, dtype = file[name].shape, file[name].dtype
        secret = tmp_path / "secret"
        secret.write_bytes(b"\1" * file[name].nbytes)
        del file[name]
        file.create_dataset(name, shape, dtype, external=[(str(secret), 0, h5py.h5f.UNLIMITED)])
    refused(path, f"'{name}' has its values in another file")
    with h5py.File(path, "r+") as file:
        del file[name]
        layout = h5py.VirtualLayout(shape, dtype)
        layout[...] = h5py.VirtualSource(str(tmp_path / "other.h5"), name, shape)
        file.create_virtual_dataset(name, layout)
    refused(path, f"'{name}' is a virtual dataset, whose values lie in other files")


COMPOUND = np.dtype([("a", "f4"), ("b", "i4")])
ABSURD: dict[str, tuple[Any, Any]] = {  # its type, and a value
    "compound": (COMPOUND, np.zeros((), COMPOUND)),
    "enumeration": (h5py.enum_dtype({"a": 1}), 1),
    "lists": (h5py.vlen_dtype(np.float32), np.zeros(3, np.float32)),
    "object references": (h5py.ref_dtype, None),
    "opaque": (np.dtype("V16"), np.zeros((), "V16")),
    "complex": (np.dtype("c8"), 1j),
    "text": (h5py.string_dtype(), "a"),
}


@pytest.mark.parametrize("name", ["fields", "time", "lat", "constants", "channel"])
def test_absurd_types(name, path):
    with h5py.File(path, "r+") as file:
        shape = file[name].shape
    for kind, (dtype, value) in ABSURD.items():
        if (kind, name) == ("text", "channel"):
            continue
        with h5py.File(path, "r+") as file:
            del file[name]
            found = file.create_dataset(name, shape, dtype)
            for place in np.ndindex(shape):
                found[place] = file.ref if value is None else value
        refused(path, "holds .*; a store holds float32, float16, int16" if name == "fields" else f"'{name}' is of type")


@pytest.mark.parametrize("name", [*VARIABLES, *CONSTANTS])
def test_absurd_shapes(name, path):
    for shape in ((), (0,), (1 << 40,), (1, 2, 3), (3, 1 << 30, 1 << 30, 1 << 30)):
        with h5py.File(path, "r+") as file:
            dtype = file[name].dtype
            del file[name]
            options = {"chunks": tuple(min(size, 4) for size in shape)} if shape and min(shape) else {}
            file.create_dataset(name, shape, dtype, **options)
        refused(path, f"'{name}'|fields are|constants are|must be|transforms for|scales?")


def test_a_variable_that_holds_nothing(path):
    with h5py.File(path, "r+") as file:
        del file["lat"]
        file["lat"] = h5py.Empty("f8")
    refused(path, "'lat' holds nothing")


@pytest.mark.parametrize("options", [{"chunks": (3, 2, 4, 5)}, {"chunks": (1, 1, 4, 5)}, {}, {"chunks": (1, 2, 4, 5)}])
def test_fields_that_were_never_stored(options, path):
    with h5py.File(path, "r+") as file:
        del file["fields"]
        file.create_dataset("fields", (12, 2, 4, 5), "f4", **options)
    refused(path, "its values are not all stored; write the store again|lacks sample 0")


def test_a_sample_without_its_checksum(path):
    with h5py.File(path, "r+") as file:
        values = file["fields"][3:4]
        file["fields"].id.write_direct_chunk((3, 0, 0, 0), values.tobytes(), filter_mask=1)
    refused(path, r"sample 3 is stored in 160 bytes instead of 164; write the store again")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("smoe_hpc_store", "two", "version 'two', which is not a whole number"),
        ("smoe_hpc_store", 2.5, "which is not a whole number"),
        ("smoe_hpc_store", np.arange(3), "which is not a whole number"),
        ("smoe_hpc_store", 99, "update it"),
        ("grid", np.arange(3), "grid kind .* is unknown"),
        ("grid", 7, "grid kind '7' is unknown"),
        ("more", np.zeros(1, COMPOUND), "attribute 'more' is of type .* must be a text, a number or a row"),
        ("more", np.zeros((2, 2)), "attribute 'more' .* shape .2, 2."),
        ("more", None, "attribute 'more' is of type object"),
        ("more", b"\xff\xfe", "attribute 'more' is not text in UTF-8"),
    ],
)
def test_absurd_attributes(name, value, words, path):
    with h5py.File(path, "r+") as file:
        if isinstance(value, bytes):
            file.attrs.create(name, value, dtype=h5py.string_dtype())
        else:
            file.attrs[name] = file.ref if value is None else value
    refused(path, words)


def test_plain_attributes_are_kept(path):
    given = {"text": "a", "texts": ["a", "b"], "number": 3, "row": np.arange(2.0), "yes": np.True_, "empty": h5py.Empty("S1")}
    with h5py.File(path, "r+") as file:
        file.attrs.update(given)
    described = describe_store(path)["attributes"]
    assert described == {"sources": "x", **given, "row": [0.0, 1.0], "empty": ""}


def test_a_crowd_of_variables_or_attributes(path):
    with h5py.File(path, "r+") as file:
        for number in range(1000):
            file[f"x{number}"] = 1
    refused(path, "holds 1012 variables, more than 1000")
    with h5py.File(path, "r+") as file:
        for number in range(1000):
            del file[f"x{number}"]
            file.attrs[f"x{number}"] = 1
    refused(path, "attributes, more than 1000")


@pytest.mark.parametrize(
    ("attribute", "value", "words"),
    [
        ("units", "hours since 1900-01-01", "times are in 'hours since 1900-01-01', a store's in 'seconds since 1970-01-01'"),
        ("calendar", "360_day", "times are of the calendar '360_day', whose days are not those of a store"),
        ("calendar", "noleap", "times are of the calendar 'noleap'"),
    ],
)
def test_times_that_are_counted_otherwise(attribute, value, words, path):
    with h5py.File(path, "r+") as file:
        file["time"].attrs[attribute] = value
    refused(path, words)


def test_numbers_that_are_no_times(path):
    with h5py.File(path, "r+") as file:
        times = file["time"][:].astype(np.float64)
        del file["time"]
        file["time"] = times
    refused(path, "'time' is of type float64, but must hold whole numbers")


@pytest.mark.parametrize("kind", ["O", "U1000000000", "f4,f4", "datetime64[s]", "nonsense", "(", "int8", "V8"])
def test_constants_of_absurd_types(kind, path):
    with h5py.File(path, "r+") as file:
        file["constant_dtype"][...] = [kind]
        file["constants"][...] = 1000.0
    refused(path, "constant 'region'")


def test_constants_that_are_not_finite(path):
    with h5py.File(path, "r+") as file:
        file["constants"][0, 0, 0] = np.nan
    refused(path, "constant 'region' does not hold finite numbers")


def test_names_that_are_no_text(path):
    with h5py.File(path, "r+") as file:
        file["units"][...] = np.array([b"\xff", b"K"], object)
    refused(path, "'units' is not text in UTF-8")


def test_a_file_with_bytes_overwritten_never_ends_in_a_traceback(path):
    sound = path.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(40):
        broken = bytearray(sound)
        start = int(generator.integers(len(sound) - 16))
        broken[start : start + 16] = generator.bytes(16)
        path.write_bytes(broken)
        with contextlib.suppress(DataError):
            Store(path).close()
