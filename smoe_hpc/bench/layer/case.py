"""What the benchmark of the layer measures: sizes, kinds of routing, and the work and bytes that no implementation can avoid.

Dimensions: B batch, C input channels, H latitude rows, W longitude columns, N experts, K selected, F filters per expert,
k kernel size.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from smoe_hpc.errors import ConfigError

ROUTINGS = ("smooth", "random", "learned")
PARTS = ("forward", "backward", "step")
PART_NAMES = {
    "forward": "forward",
    "backward": "forward + backward",
    "step": "forward + backward + routing loss + damping",
    "select": "select",
    "plan": "plan",
}
_WIDTH = 128  # K F where a case does not say otherwise
_LETTERS = {"B": "batch", "C": "channels", "N": "num_experts", "K": "selected", "F": "filters", "k": "kernel_size"}


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer and its input.

    Args:
        batch: B.
        channels: C.
        grid: (H, W).
        num_experts: N.
        selected: K.
        filters: F.
        kernel_size: k.

    Raises:
        ConfigError: invalid sizes.
    """

    batch: int
    channels: int
    grid: tuple[int, int]
    num_experts: int
    selected: int
    filters: int = 1
    kernel_size: int = 3

    def __post_init__(self) -> None:
        sizes = (self.batch, self.channels, *self.grid, self.num_experts, self.selected, self.filters, self.kernel_size)
        if min(sizes) < 1 or self.selected > self.num_experts or self.kernel_size % 2 == 0:
            raise ConfigError(f"case {self}: sizes are at least 1, K at most N, and the kernel size is odd")

    def __str__(self) -> str:
        size = f"B{self.batch} C{self.channels} {self.grid[0]}x{self.grid[1]} N{self.num_experts} K{self.selected}"
        kernel = "" if self.kernel_size == 3 else f" k{self.kernel_size}"
        return f"{size} F{self.filters}{kernel}"

    @property
    def out_channels(self) -> int:
        """K F."""
        return self.selected * self.filters

    @property
    def pixels(self) -> int:
        """H W."""
        return self.grid[0] * self.grid[1]

    @property
    def learns_routing(self) -> bool:
        """Whether there is anything to choose: K below N."""
        return self.selected < self.num_experts

    def useful_flop(self, part: str) -> float:
        """Operations that the selected experts' filters need, a multiply-add counted as two."""
        taps = self.kernel_size**2
        forward = 2.0 * self.batch * self.pixels * self.out_channels * self.channels * taps
        return {"forward": forward, "backward": 3 * forward, "step": 3 * forward}.get(part, 0.0)

    def least_bytes(self, part: str, element: int, weight_element: int, *, indexed: bool = True) -> float:
        """Bytes that must move through the device's memory: every input read once, every output written once.

        Args:
            part: of :data:`PARTS`, or "select": logits read and indices (4 bytes each) written.
            element: bytes of an element of input and output.
            weight_element: bytes of an element of the parameter and its gradient.
            indexed: whether there is an index of the chosen experts to read; a plain convolution has none.
        """
        x = self.batch * self.pixels * self.channels * element
        y = self.batch * self.pixels * self.out_channels * element
        weight = self.num_experts * self.filters * self.channels * self.kernel_size**2 * weight_element
        index = 4 * self.pixels * self.selected if indexed else 0
        logits = 4 * self.pixels * self.num_experts
        forward = x + weight + index + y
        backward = x + weight + index + y + x + weight  # reads x, weights, indices and g; writes both gradients
        needed = {"forward": forward, "backward": forward + backward, "step": forward + backward + 2 * logits}
        return float(needed.get(part, logits + index if part == "select" else 0))


@dataclass(frozen=True)
class Case:
    """A shape and a kind of routing, of :data:`ROUTINGS`."""

    shape: Shape
    routing: str = "smooth"

    def __str__(self) -> str:
        return f"{self.shape} {self.routing}"


def parse_shape(text: str) -> Shape:
    """The shape that a text such as ``B8 C128 128x256 N1024 K128 F1`` names; B 8, C 128, F 1, K 128 / F if left out.

    >>> str(parse_shape("B32 32x64 N64 F16"))
    'B32 C128 32x64 N64 K8 F16'

    Raises:
        ConfigError: a word that is not understood, or no grid or number of experts.
    """
    found: dict[str, int] = {}
    grid: tuple[int, int] | None = None
    for word in text.replace(",", " ").split():
        rows_columns = re.fullmatch(r"(\d+)x(\d+)", word)
        letter = re.fullmatch(r"([BCNKFk])(\d+)", word)
        if rows_columns:
            grid = int(rows_columns[1]), int(rows_columns[2])
        elif letter:
            found[_LETTERS[letter[1]]] = int(letter[2])
        else:
            raise ConfigError(f"case {text!r}: {word!r} is not understood; write e.g. 'B8 C128 128x256 N1024 K128 F1'")
    if grid is None or "num_experts" not in found:
        raise ConfigError(f"case {text!r} needs a grid and N, e.g. '128x256 N1024'")
    filters = found.setdefault("filters", 1)
    found.setdefault("selected", min(max(_WIDTH // max(filters, 1), 1), found["num_experts"]))
    found = {"batch": 8, "channels": 128, **found}
    return Shape(grid=grid, **found)


def cases_of(selection: str) -> tuple[Case, ...]:
    """The cases of a selection, the most telling first: "quick", "full" or "cpu".

    Raises:
        ConfigError: another name.
    """
    if selection not in _SELECTIONS:
        raise ConfigError(f"selection {selection!r} is not known; choose one of {', '.join(_SELECTIONS)}")
    return tuple(Case(parse_shape(shape), kind) for shape, kinds in _SELECTIONS[selection] for kind in kinds.split())


def chosen_cases(selection: str, shapes: Sequence[str], routings: Sequence[str]) -> tuple[Case, ...]:
    """The cases of a selection, or of given shapes instead; with given routings in place of those they have.

    Raises:
        ConfigError: a selection, shape or routing that is not understood.
    """
    for name in routings:
        if name not in ROUTINGS:
            raise ConfigError(f"routing {name!r} is not known; choose among {', '.join(ROUTINGS)}")
    cases = tuple(Case(parse_shape(text)) for text in shapes) or cases_of(selection)
    if not routings:
        return cases
    return tuple(Case(shape, name) for shape in dict.fromkeys(case.shape for case in cases) for name in routings)


_QUICK = (
    ("B32 32x64 N256", "learned smooth random"),
    ("B8 128x256 N256", "smooth random"),
    ("B8 128x256 N1024", "smooth"),
    ("B8 128x256 N4096", "smooth"),
    ("B8 128x256 N64 F16", "smooth"),
)
_MORE = (
    ("B8 128x256 N8192", "smooth"),
    ("B32 32x64 N64 F16", "smooth random"),
    ("B32 32x64 N512 F16", "smooth learned"),
    ("B8 128x256 N512 F16", "smooth random"),
    ("B32 32x64 N1024", "smooth random learned"),
    ("B32 32x64 N4096", "smooth random"),
    ("B32 32x64 N128", "smooth"),
    ("B8 128x256 N128", "smooth"),
    ("B32 32x64 N128 F8", "smooth random"),
    ("B8 128x256 N1024 F8", "smooth"),
    ("B32 32x64 N8192", "smooth"),
)
_MORE_ROUTINGS = (
    ("B8 128x256 N256", "learned"),
    ("B8 128x256 N1024", "random learned"),
    ("B8 128x256 N4096", "random"),
    ("B8 128x256 N64 F16", "random learned"),
)
_SELECTIONS = {
    "quick": _QUICK,
    "full": (*_QUICK, *_MORE_ROUTINGS, *_MORE),
    "cpu": (("B32 C1 64x64 N3 K1", "smooth random"), ("B8 C32 32x64 N128 K32", "smooth random")),
}
