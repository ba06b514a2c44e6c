"""``model.json``: what a trained network takes and gives, so that its weights can be used without the data they learned from.

Beside it lie ``weights.safetensors`` and, where the network reads fields that never change, ``fixed_fields.safetensors``:
``constants`` [K, H, W] float32, normalised, and ``region_map`` [H, W]. These files alone are enough to use the network.
Read without torch. Nothing in them can run code, and each is held against a checksum.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from smoe_hpc.errors import CheckpointError
from smoe_hpc.files import writing
from smoe_hpc.io.grids import Grid
from smoe_hpc.runs.layout import MODEL

FORMAT = 1
_LARGEST = 16 << 20


@dataclass(frozen=True)
class ChannelScaling:
    """A channel as the network sees it: ``(transform(value) - mean) / std``.

    Attributes:
        name: e.g. ``z500``.
        units: of physical values.
        transform: ``"none"``, or what stands between physical values and the normalised ones, e.g. ``log:0.001``.
        mean: 0 where nothing is normalised.
        std: 1 where nothing is normalised.
    """

    name: str
    units: str
    transform: str
    mean: float
    std: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise ValueError(f"channel {self.name!r} has mean {self.mean} and std {self.std}")


@dataclass(frozen=True, eq=False)
class Description:
    """What a trained network takes and gives.

    Attributes:
        recipe: YAML of the whole recipe (`config.parse_recipe` reads it), which says what network it is.
        step: optimiser step of the weights.
        grid: points of inputs and outputs.
        axis: what names a field: ``"time"`` (offsets and leads are hours) or ``"run"`` (they are steps of a run).
        offsets: of the input fields from the start, ascending, none after 0.
        inputs: channels of each input field.
        constants: names of the fixed fields that follow them.
        leads: from the start to the outputs.
        lead_mode: "direct" gives all leads at once, as channels; "continuous" one, told by an input channel.
        targets: channels of each output field.
        newest: input channels that hold the newest field of each target; None where an input lacks one.
        synthetic: whether the data it learned from are synthetic.
        version: of this package, when it was written.
        files: {file: sha256} of what lies beside it.
    """

    recipe: str
    step: int
    grid: Grid
    axis: Literal["time", "run"]
    offsets: tuple[int, ...]
    inputs: tuple[ChannelScaling, ...]
    constants: tuple[str, ...]
    leads: tuple[int, ...]
    lead_mode: Literal["direct", "continuous"]
    targets: tuple[ChannelScaling, ...]
    newest: tuple[int, ...] | None
    synthetic: bool
    version: str
    files: dict[str, str]

    @property
    def in_channels(self) -> int:
        """Channels of the network's input."""
        return len(self.offsets) * len(self.inputs) + len(self.constants) + int(self.lead_mode == "continuous")

    @property
    def out_channels(self) -> int:
        """Channels of the network's output."""
        return len(self.targets) * (len(self.leads) if self.lead_mode == "direct" else 1)


def write(run: Path, description: Description) -> None:
    """Write ``model.json``, whole. OSError if that fails."""
    grid = description.grid
    body = {
        "format": FORMAT,
        **{key: value for key, value in asdict(description).items() if key != "grid"},
        "grid": {"kind": grid.kind, "lat": grid.lat.tolist(), "lon": grid.lon.tolist()},
    }
    writing.write_json(run / MODEL, {**body, "sha256": writing.sha256_of_json(body)})


def read(run: Path) -> Description:
    """Read ``model.json``.

    Raises:
        CheckpointError: it is missing, damaged, or of a later version.
    """
    path = run / MODEL
    try:
        body = writing.read_json(path, _LARGEST)
        if body.pop("sha256", None) != writing.sha256_of_json(body):
            raise ValueError("its checksum differs")
        found = body.pop("format")
        if found != FORMAT:
            raise CheckpointError(f"{path} has format {found}, this version reads {FORMAT}; update smoe-hpc")
        return _parsed(body)
    except FileNotFoundError:
        raise CheckpointError(
            f"{run} has no {MODEL}: its training has not ended, or an early version trained it; `smoe-hpc train` with the "
            "run's recipe and data ends it, or writes the file of a run that has ended"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} is not readable ({error.strerror or error}); restore the file") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); `smoe-hpc train` with the run's recipe makes it anew") from None


def _parsed(body: dict[str, Any]) -> Description:
    if body["axis"] not in ("time", "run") or body["lead_mode"] not in ("direct", "continuous"):
        raise ValueError("axis or lead_mode has no known value")
    grid = body["grid"]
    return Description(
        recipe=str(body["recipe"]),
        step=int(body["step"]),
        grid=Grid(str(grid["kind"]), grid["lat"], grid["lon"]),
        axis=body["axis"],
        offsets=_integers(body["offsets"]),
        inputs=tuple(ChannelScaling(**channel) for channel in body["inputs"]),
        constants=tuple(map(str, body["constants"])),
        leads=_integers(body["leads"]),
        lead_mode=body["lead_mode"],
        targets=tuple(ChannelScaling(**channel) for channel in body["targets"]),
        newest=None if body["newest"] is None else _integers(body["newest"]),
        synthetic=bool(body["synthetic"]),
        version=str(body["version"]),
        files={str(name): str(digest) for name, digest in body["files"].items()},
    )


def _integers(values: list[Any]) -> tuple[int, ...]:
    return tuple(int(value) for value in values)
