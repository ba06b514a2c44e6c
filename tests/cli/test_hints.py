"""What an error tells a user to do works: the commands that it names are run on the input that it was about."""

import re
import shlex
from pathlib import Path

import h5py
import pytest

from smoe_hpc.config import load_recipe, recipe_names
from tests.cli.calling import command

ROOT = Path(__file__).resolve().parents[2]
COMMAND = re.compile(r"`(smoe-hpc [^`]+)`")
CLASSIC, TEXT = b"CDF\x01" + bytes(100), b"no fields here"
WEATHER = [name for name in recipe_names() if name.startswith("weather_")]


def refused(*arguments: str) -> str:
    """The one line that a command ends with, or that `data verify` has for a file."""
    result = command(*arguments)
    if arguments[:2] == ("data", "verify") and result.exit_code == 1:
        (line,) = [line for line in result.stdout.splitlines() if line.startswith("BAD: ")]
        return line
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Files and folders that are no stores, named as people name them."""
    monkeypatch.chdir(tmp_path)
    Path("classic.nc").write_bytes(CLASSIC)
    Path("notes.txt").write_bytes(TEXT)
    Path("text.h5").write_bytes(TEXT)
    Path("none.h5").touch()
    for name in ("netcdf4.nc", "foreign.h5"):
        with h5py.File(name, "w") as file:
            file["t2m"] = [280.0]
    for name in ("a.zarr", "months", "nothing", "mixed"):
        Path(name).mkdir()
    Path("a.zarr/.zgroup").write_text("{}")
    Path("months/2019 01.nc").write_bytes(CLASSIC)
    Path("mixed/about.txt").write_bytes(TEXT)


@pytest.fixture
def grib() -> Path:
    """A GRIB file that can be converted, also under a name that lies, and in a folder."""
    pytest.importorskip("eccodes")
    from tests.io.convert.grib_files import write_grib

    made = write_grib(Path("a file.grib"), [0, 6, 12])
    for copy in ("lies.h5", "mixed/b.grib"):
        Path(copy).write_bytes(made.read_bytes())
    return made


BY_HAND = ["classic.nc", "netcdf4.nc", "foreign.h5", "a.zarr", "months"]
NEITHER = ["notes.txt", "text.h5", "none.h5", "nothing"]
LOOKS = [("data", "inspect"), ("data", "verify"), ("data", "splits")]


@pytest.mark.parametrize("verb", LOOKS, ids=" ".join)
@pytest.mark.parametrize("path", [*BY_HAND, *NEITHER, "missing.h5"])
def test_what_cannot_be_converted_is_not_sent_to_the_converter(path: str, verb: tuple[str, str]):
    line = refused(*verb, path)
    assert path in line
    assert COMMAND.findall(line) == []
    assert "convert it" not in line
    assert ("smoe_hpc.io.StoreWriter (docs/weather.md)" in line) == (path in BY_HAND)


@pytest.mark.parametrize("path", [*BY_HAND, *NEITHER, "missing.grib"])
def test_the_converter_sends_nobody_in_a_circle(path: str):
    line = refused("data", "convert", path, "new.h5")
    assert COMMAND.findall(line) == []
    assert ("smoe_hpc.io.StoreWriter (docs/weather.md)" in line) == (path in BY_HAND)


@pytest.mark.parametrize("path", ["a file.grib", "lies.h5", "mixed"])
def test_grib_is_sent_to_the_converter(path: str, grib: Path):
    hints = set()
    for verb in LOOKS:
        (hint,) = COMMAND.findall(refused(*verb, path))
        hints.add(hint)
    (hint,) = hints
    done = command(*shlex.split(hint)[1:])
    assert done.exit_code == 0, done.output
    assert command("data", "inspect", shlex.split(hint)[-1]).exit_code == 0


def test_a_store_is_sent_to_inspect(grib: Path):
    assert command("data", "convert", str(grib), "a store.h5").exit_code == 0
    (hint,) = COMMAND.findall(refused("data", "convert", "a store.h5", "new.h5"))
    assert command(*shlex.split(hint)[1:]).exit_code == 0


@pytest.mark.parametrize("verb", [("train",), ("submit", "--cluster", "local")], ids=" ".join)
@pytest.mark.parametrize("store", ["uk.h5", "my data", "years/19*.h5"])
def test_a_regional_recipe_without_data(store: str, verb: tuple[str, ...], grib: Path):
    (hint,) = COMMAND.findall(refused(*verb, "uk_t2m_conv", f"data.store={store}"))
    done = command(*(str(grib) if word == "FILE.grib" else word for word in shlex.split(hint)[1:]))
    assert done.exit_code == 0, done.output
    made = shlex.split(hint)[-1]
    assert Path(made).parent in (Path(store).parent, Path(store))
    looked = command("train", "uk_t2m_conv", f"data.store={made}", "--dry-run")
    assert "no data" not in looked.stderr, "the store is found, its three hours are too few"


@pytest.mark.parametrize("recipe", ["heat_smoe", "heat_noisy"])
def test_a_heat_recipe_without_data(recipe: str):
    """Noise and all: data without it would be refused again."""
    small = ["--runs", "1", "1", "1", "--grid", "8", "8", "--steps", "4"]
    hints = {hint for verb in ("train", "submit") for hint in COMMAND.findall(refused(verb, recipe, "data.store=my heat"))}
    (hint,) = hints
    assert command(*shlex.split(hint)[1:], *small).exit_code == 0
    assert command("train", recipe, "data.store=my heat", "training.batch=2", "--dry-run").exit_code == 0
    assert COMMAND.findall(refused("train", recipe, "data.store=text.h5")) == [], "a file cannot become that folder"


def test_a_noisy_recipe_on_other_heat_data():
    small = ["--runs", "1", "1", "1", "--grid", "8", "8", "--steps", "4"]
    for made in ([], ["--noise", "1", "--overwrite"]):
        assert command("data", "heat", "h", *small, *made).exit_code == 0
        (hint,) = COMMAND.findall(refused("train", "heat_noisy", "data.store=h"))
        assert command(*shlex.split(hint)[1:], *small).exit_code == 0
        assert command("train", "heat_noisy", "data.store=h", "training.batch=2", "--dry-run").exit_code == 0


def test_a_weather_recipe_without_data():
    """What is named makes data that each of the recipes takes, and is not called ERA5 afterwards."""
    lines = [refused(*verb, name) for name in WEATHER for verb in (("train",), ("submit",), ("data", "statistics"))]
    (make, share) = dict.fromkeys(hint for line in lines for hint in COMMAND.findall(line))
    assert all("docs/weather.md" in line and "heat" not in line for line in lines)
    assert command(*shlex.split(make)[1:]).exit_code == 0
    splits = command(*shlex.split(share)[1:])
    assert splits.exit_code == 0, splits.output
    store = shlex.split(share)[-1]
    assert store not in {load_recipe(name).data.store for name in WEATHER}
    for name in WEATHER:
        few = ["model.blocks=1", "model.num_experts=128"] if "smoe" in name else ["model.blocks=1"]
        done = command("train", name, f"data.store={store}", *splits.stdout.split(), *few, "--dry-run")
        assert done.exit_code == 0, done.output


def test_the_pages_named_are_there():
    sources = [path.read_text() for room in ("smoe_hpc", "io", "launch") for path in (ROOT / room).rglob("*.py")]
    named = {page for source in sources for page in re.findall(r"docs/\w+\.md", source)}
    assert {"docs/weather.md", "docs/regional.md"} <= named
    assert [page for page in named if not (ROOT / page).exists()] == []
    assert "StoreWriter" in (ROOT / "docs/weather.md").read_text()
