"""Imports go down: the floors that docs/architecture.md draws, held against every import of the package, also lazy ones."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "smoe_hpc"

# A room may import rooms of lower floors, and itself; rooms of one floor do not know each other. From the ground up.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "text", "progress", "compat", "__version__"),
    ("files",),
    ("config",),
    ("kernels",),
    ("layers", "launch"),
    ("io", "models"),
    ("runs",),
    ("scores",),
    ("training", "inference"),
    ("tasks",),
    ("report",),
    ("jobs", "bench"),
    ("experiments",),
    ("cli",),
    ("__main__",),
)
# Names that may point up, for they are only looked up when somebody asks for them.
LAZY = {("smoe_hpc/__init__.py", "*"), ("smoe_hpc/launch/__init__.py", "jobs")}
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> Iterator[Path]:
    """Every module of the package; the links to io and launch are followed."""
    for folder in (PACKAGE, PACKAGE / "io", PACKAGE / "launch"):
        yield from folder.rglob("*.py")


def dotted(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    return name.removesuffix(".__init__")


KNOWN = {dotted(path): path for path in modules()}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module of ours, whether only type checkers import it), at the top and inside functions."""
    tree = ast.parse(path.read_text())
    typing = {
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.dump(branch.test)
        for part in branch.body
        for node in ast.walk(part)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports within the package are written out"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] == "smoe_hpc":
                yield (name if name in KNOWN else name.rpartition(".")[0]), node in typing


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__version__"


def test_every_room_has_a_floor():
    rooms = {room_of(name) for name in KNOWN if name != "smoe_hpc"}
    assert rooms - set(FLOOR) == set()
    assert set(FLOOR) - rooms - {"__version__"} == set()


def test_no_import_goes_up_or_sideways():
    wrong = []
    for module, path in KNOWN.items():
        where = str(path.relative_to(PACKAGE.parent))
        if (where, "*") in LAZY:
            continue
        for imported, _ in imports(path):
            room, other = room_of(module), room_of(imported)
            if (where, other) not in LAZY and room != other and FLOOR[other] >= FLOOR[room]:
                wrong.append(f"{where} imports {imported}")
    assert wrong == []


def test_there_is_no_circle():
    """Not even through imports inside functions; what only type checkers import counts too."""
    lazy = {path for path, _ in LAZY}
    graph = {
        module: {imported for imported, _ in imports(path) if imported != module}
        for module, path in KNOWN.items()
        if str(path.relative_to(PACKAGE.parent)) not in lazy
    }
    assert circles(graph) == []


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other in a circle: the strongly connected components of more than one (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in graph:
        if node not in index:
            visit(node)
    return sorted(found)


def test_a_forbidden_import_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "smoe_hpc/kernels/new.py"
    path.parent.mkdir(parents=True)
    path.write_text("def late():\n    from smoe_hpc.layers import routing_loss\n")
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path / "smoe_hpc")
    monkeypatch.setattr(f"{__name__}.KNOWN", {"smoe_hpc.layers": path, "smoe_hpc.kernels.new": path})
    with pytest.raises(AssertionError, match=r"new\.py imports smoe_hpc\.layers"):
        test_no_import_goes_up_or_sideways()
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_the_picture_shows_the_floors():
    """docs/architecture.md draws a box for every room, the highest floor first."""
    text = (PACKAGE.parent / "docs/architecture.md").read_text()
    drawn = [line for line in text.split("```")[1].splitlines() if line.strip().startswith("|")]
    rooms = [{room.strip() for room in line.strip().strip("|").split("|")[0].split()} for line in drawn]
    assert rooms == [set(floor) - {"__version__", "__main__"} for floor in reversed(FLOORS) if floor != ("__main__",)]
