"""What a recipe says: frozen dataclasses, one per section of the YAML file.

Each dataclass is plain Python (numbers, text, lists) and checks itself when it is made, so that a recipe that exists is
a recipe that can run. OmegaConf reads YAML and overrides into them (`loading.py`); nothing here knows of torch. The
rules stand in `checks.py`, `model_checks.py`, `sharing.py` and `idle.py`, the recipes in `smoe_hpc/recipes/`.

Dimensions: B batch, C input channels, H rows, W columns, N experts (|E| of the paper), K selected experts (E of the
paper), F filters per expert. "Paper" is Dryden and Hoefler, Spatial Mixture-of-Experts, NeurIPS 2022.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from smoe_hpc.config import checks, idle
from smoe_hpc.config.model import Model


@dataclass(frozen=True)
class Splits:
    """Which samples each split holds; the inputs and the target of a sample lie inside one split.

    Attributes:
        train: run numbers ``"0:1000"`` (first to one before last) for heat, dates ``"2019-03-01/2019-03-23"`` (both
            days whole) for regional and weather; ``""`` is everything that the split's file holds.
        validation: the same, for the score that drives the schedule and picks the best checkpoint.
        test: the same, for the score that is reported.
    """

    train: str = ""
    validation: str = ""
    test: str = ""

    def __getitem__(self, split: str) -> str:
        """Range of a split by its name; ConfigError with the names there are for any other."""
        return str(getattr(self, checks.known("split", split, [f.name for f in fields(self)])))


@dataclass(frozen=True)
class Data:
    """Which data, and what of it makes a sample.

    Attributes:
        store: path, from the working directory: for heat the folder with heat_train.h5, heat_validation.h5 and
            heat_test.h5; for regional and weather one store file, or several of successive times: a folder or a pattern.
        inputs: times of the input frames before the start of a forecast, ascending and none after 0: hours (regional,
            weather) or steps (heat).
        lead: time from the start to the target, in the unit of ``inputs``.
        leads: weather only: several leads, ascending, in place of ``lead``; null has the one.
        lead_mode: weather only: "direct" forecasts all leads at once, as channels; "continuous" forecasts one, which it
            is told by a further input channel, drawn from ``leads`` for each sample.
        validation_leads: weather only: the leads at which a model of continuous lead is validated and tested; null takes
            ``leads``.
        variables: regional and weather: channels read as input; null takes all.
        targets: regional and weather: channels to forecast; null takes the input channels.
        constants: weather only: constant fields read as input, by their names in the store, e.g. land_sea_mask.
        order: of training samples: "global" shuffles them all; "blocks" shuffles blocks of consecutive ones, so that
            neighbours share what is read.
        block: samples of a block.
        gaps: where times are missing between the first and the last of a split: "refuse" it, or "skip" the samples
            that would need them.
        splits: see :class:`Splits`.
        normalize: subtract the training split's mean and divide by its standard deviation, per channel. Heat is not
            normalised (its score is relative to the value itself).
        noise: heat only: size of the Gaussian noise in the training targets, in units of what tells the two most alike
            regions apart; the data must have been written with the same (`smoe-hpc data heat --noise`).
        noise_ratio: heat only: how many times larger the noise is in the western half of the domain.
    """

    store: str
    inputs: list[int] = field(default_factory=lambda: [0])
    lead: int = 1
    leads: list[int] | None = None
    lead_mode: Literal["direct", "continuous"] = "direct"
    validation_leads: list[int] | None = None
    variables: list[str] | None = None
    targets: list[str] | None = None
    constants: list[str] = field(default_factory=list)
    order: Literal["global", "blocks"] = "global"
    block: int = 32
    gaps: Literal["refuse", "skip"] = "skip"
    splits: Splits = field(default_factory=Splits)
    normalize: bool = False
    noise: float = 0.0
    noise_ratio: float = 1.0

    def __post_init__(self) -> None:
        checks.check_data(self)

    @property
    def all_leads(self) -> list[int]:
        """Leads that training sees."""
        return [self.lead] if self.leads is None else self.leads


@dataclass(frozen=True)
class Loader:
    """How samples come into memory. It changes no result, so two runs that differ in it alone are the same experiment.

    Attributes:
        front: "plain" (threads), "dali" (NVIDIA DALI) or "auto": dali where it is installed and helps, else plain.
        workers: that read and make batches, on each process.
        prefetch: batches made ahead.
        verify: whether checksums are looked at while reading: "off", "sampled" (a fixed few of the fields) or "all".
    """

    front: Literal["plain", "dali", "auto"] = "plain"
    workers: int = 1
    prefetch: int = 2
    verify: Literal["off", "sampled", "all"] = "off"

    def __post_init__(self) -> None:
        checks.check_loader(self)


@dataclass(frozen=True)
class Optimizer:
    """How parameters move.

    Attributes:
        kind: "adam" (coupled weight decay, as torch.optim.Adam) or "sgd" (momentum ``betas[0]``).
        lr: learning rate of experts, kernels and biases.
        betas: Adam's decay rates of the first and second moment.
        eps: Adam's eps (gates have their own, 1e-15: their gradients are tiny).
        weight_decay: on experts and kernels only.
        gate_lr: learning rate of gates; null takes ``lr``. Gates want a larger one where targets are noisy.
        clip: largest norm of the gradient (gates not counted); null does not clip.
    """

    kind: Literal["adam", "sgd"] = "adam"
    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0
    gate_lr: float | None = None
    clip: float | None = None

    def __post_init__(self) -> None:
        checks.check_optimizer(self)


@dataclass(frozen=True)
class Schedule:
    """When learning rates fall and when training ends, both by the validation score (paper, section on training).

    Attributes:
        factor: what learning rates are multiplied by on a plateau, in (0, 1]; 1 never changes them.
        patience: validations without improvement that are borne before.
        min_lr: below this no learning rate falls.
        early_stop: validations without improvement after which training ends; null never.
        min_delta: a smaller change of the score is no improvement (in the score's unit).
    """

    factor: float = 0.1
    patience: int = 15
    min_lr: float = 0.0
    early_stop: int | None = None
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        checks.check_schedule(self)


@dataclass(frozen=True)
class Training:
    """How long, in which portions and how exactly.

    Attributes:
        epochs: at most this many passes over the training split.
        max_steps: at most this many optimiser steps; null sets no limit.
        batch: samples per optimiser step over ALL ranks (global batch).
        accumulation: forward and backward passes per optimiser step; divides the batch of each rank.
        precision: "float32", "bf16" (autocast; gates stay float32) or "float64" (for checks).
        seed: of start values, sample order and noise.
        deterministic: bit-reproducible arithmetic; null: on CPU yes, on a GPU no.
        zero_stage: ZeRO stage of the optimiser state (DeepSpeed).
        routing_refresh: optimiser steps between two refreshes of the routing.
        routing_delay: 0: the step after a refresh uses it; 1: the one after that.
        validate_every: optimiser steps between two validations; null: once an epoch.
        stop_at_score: end once the validation score is this good (heat: 100.0); null never.
        threads: CPU threads of each process; null leaves torch's choice.
    """

    epochs: int = 150
    max_steps: int | None = None
    batch: int = 32
    accumulation: int = 1
    precision: Literal["float32", "bf16", "float64"] = "float32"
    seed: int = 0
    deterministic: bool | None = None
    zero_stage: Literal[0, 1, 2] = 0
    routing_refresh: int = 1
    routing_delay: Literal[0, 1] = 0
    validate_every: int | None = None
    stop_at_score: float | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        checks.check_training(self)


@dataclass(frozen=True)
class Run:
    """Where a run is kept and what it writes.

    Attributes:
        root: folder of all runs; the run's own is ``<root>/<name>``.
        checkpoint_every: optimiser steps between two checkpoints; null: once an epoch.
        checkpoint_seconds: also after this many seconds since the last; null never.
        keep: newest checkpoints that stay on disk (the best one stays besides).
        log_every: optimiser steps between two lines of metrics.jsonl.
        pictures: draw pictures when training ends.
        tensorboard: write TensorBoard event files too.
    """

    root: str = "runs"
    checkpoint_every: int | None = None
    checkpoint_seconds: float | None = None
    keep: int = 2
    log_every: int = 1
    pictures: bool = True
    tensorboard: bool = False

    def __post_init__(self) -> None:
        checks.check_run(self)


@dataclass(frozen=True)
class Recipe:
    """One experiment.

    Attributes:
        name: names the run directory.
        task: "heat" (location-dependent heat diffusion, paper section 4.1), "regional" (forecast of a field on a
            regional latitude-longitude grid) or "weather" (medium-range forecast on a global one, paper section 4.2).
        data, model, optimizer, schedule, training, loader, run: the sections.
    """

    name: str
    task: Literal["heat", "regional", "weather"]
    data: Data
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    training: Training = field(default_factory=Training)
    loader: Loader = field(default_factory=Loader)
    run: Run = field(default_factory=Run)

    def __post_init__(self) -> None:
        checks.check_recipe(self)
        idle.check_idle(self)
