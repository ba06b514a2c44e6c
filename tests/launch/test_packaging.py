"""What is installed is what stands in the checkout, and the standard library's `io` stays what it is."""

import ast
import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import smoe_hpc
from smoe_hpc.launch import requirements

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which a wheel lies unpacked that was built from a copy of the checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("smoe_hpc", "io", "launch"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    command = ("from setuptools.build_meta import build_wheel; import sys; print(build_wheel(sys.argv[1]))", str(copy))
    done = subprocess.run([sys.executable, "-c", *command], cwd=copy, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(next(copy.glob("*.whl"))).extractall(folder)
    return folder


@pytest.fixture(scope="module")
def wheel(installed: Path) -> set[str]:
    """Names of the files in the wheel."""
    return {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}


def test_the_wheel_holds_every_module(wheel: set[str]) -> None:
    for folder, inside in (("smoe_hpc", "smoe_hpc"), ("io", "smoe_hpc/io"), ("launch", "smoe_hpc/launch")):
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{inside}/{path.relative_to(ROOT / folder).as_posix()}" in wheel


def test_the_wheel_holds_recipes_and_scripts(wheel: set[str]) -> None:
    recipes = list((ROOT / "smoe_hpc").rglob("*.yaml"))
    for path in [*recipes, *(ROOT / "smoe_hpc" / "launch").glob("*.sh")]:
        assert path.relative_to(ROOT).as_posix() in wheel
    assert "smoe_hpc/py.typed" in wheel


def test_the_wheel_holds_nothing_else(wheel: set[str]) -> None:
    assert {name.split("/")[0] for name in wheel} == {"smoe_hpc", f"smoe_hpc-{smoe_hpc.__version__}.dist-info"}


def test_type_checkers_know_the_names(installed: Path, tmp_path: Path) -> None:
    """What a user's own mypy sees of the wheel: signatures, not Any."""
    (tmp_path / "user.py").write_text(
        "import smoe_hpc\n"
        "model = smoe_hpc.load_run('runs/x')\n"
        "reveal_type(model.network)\n"
        "reveal_type(smoe_hpc.train('heat_smoe', {'training.seed': 1}))\n"
        "smoe_hpc.evaluate('runs/x', 'tset')\n"
        "smoe_hpc.SpatialMoE2d(3, num_experts='4', selected=2, grid=(4, 4))\n"
    )
    options = ["--follow-imports=silent", "--ignore-missing-imports", "--no-error-summary", "user.py"]
    environment = {**os.environ, "MYPYPATH": str(installed)}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert 'Revealed type is "torch.nn.modules.module.Module"' in done.stdout, done.stdout
    assert "dict[str, dict[str, dict[str, float]]]" in done.stdout
    assert 'user.py:5: error: Argument 2 to "evaluate"' in done.stdout
    assert 'user.py:6: error: Argument "num_experts"' in done.stdout


@pytest.mark.parametrize("name", ["io", "launch"])
def test_the_links_are_relative(name: str) -> None:
    assert (ROOT / "smoe_hpc" / name).readlink() == Path("..", name)


@pytest.mark.parametrize("folder", ["smoe_hpc", "io", "launch", "tests"])
def test_nothing_imports_the_rooms_bare(folder: str) -> None:
    """Once installed, `launch` is nothing and `io` the standard library's: ours are smoe_hpc.launch and smoe_hpc.io."""
    ours = {path.stem for path in (ROOT / "io").iterdir()}
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                room, _, rest = name.partition(".")
                assert room != "launch", f"{path}:{node.lineno} imports {name}"
                assert room != "io" or rest.split(".")[0] not in ours, f"{path}:{node.lineno} imports {name}"


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ["torch", "deepspeed", "h5py", "mpi4py", "numpy"]
    code = f"import sys, smoe_hpc; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_one_version_everywhere() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {smoe_hpc.__version__}\n" in citation


def test_extras() -> None:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    assert set(parser["options.extras_require"]) == {"dali", "convert", "report", "test"}


def test_declared_requirements() -> None:
    base = requirements.declared(ROOT / "setup.cfg", [])
    assert base[0].startswith("torch"), "torch is looked for by name, and installed before the others"
    test = requirements.declared(ROOT / "setup.cfg", ["test"])
    assert set(base) < set(test)
    assert set(requirements.declared(ROOT / "setup.cfg", ["convert", "report"])) < set(test)
    with pytest.raises(KeyError):
        requirements.declared(ROOT / "setup.cfg", ["tset"])


def test_unmet_requirements() -> None:
    asked = ["pytest>=1", "pytest<1", "no-such-thing", "no-such-thing; python_version < '3'"]
    assert requirements.unmet(asked) == ["pytest<1", "no-such-thing"]
    assert requirements.unmet(requirements.declared(ROOT / "setup.cfg", ["test"])) == []
