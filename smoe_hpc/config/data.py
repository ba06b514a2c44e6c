"""The data section of a recipe: which data, and what of it makes a sample."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from smoe_hpc.config import rules


@dataclass(frozen=True)
class Splits:
    """Which samples each split holds; the inputs and the target of a sample lie inside one split.

    Attributes:
        train: run numbers ``"0:1000"`` (the end is not part) for heat, dates ``"2019-03-01/2019-03-23"`` (both
            days are part) for regional and weather; ``""`` is everything that the split's file holds.
        validation: the same, for the score that drives the schedule and picks the best checkpoint.
        test: the same, for the score that is reported.
    """

    train: str = ""
    validation: str = ""
    test: str = ""

    def __getitem__(self, split: str) -> str:
        """Range of a split by its name; ConfigError with the names there are for any other."""
        return str(getattr(self, rules.one_of("split", split, [f.name for f in fields(self)])))


@dataclass(frozen=True)
class Data:
    """Which data, and what of it makes a sample.

    Attributes:
        store: path, from the working directory: for heat the folder with heat_train.h5, heat_validation.h5 and
            heat_test.h5; for regional and weather one store file, or several of successive times: a folder or a pattern.
        inputs: times of the input frames before the start of a forecast, ascending and none after 0: hours (regional,
            weather) or steps (heat).
        lead: time from the start to the target, above 0, in the unit of ``data.inputs``.
        leads: weather only: several leads, above 0 and ascending, in place of ``data.lead``; null takes that one.
        lead_mode: weather only: "direct" forecasts all leads at once, as channels; "continuous" forecasts one, which it
            is told by a further input channel, drawn from ``data.leads`` for each sample.
        validation_leads: weather only: the leads at which a model of continuous lead is validated and tested; above
            0 and ascending; null takes ``data.leads``.
        variables: regional and weather: channels read as input; null takes all.
        targets: regional and weather: channels to forecast; null takes the input channels.
        constants: weather only: constant fields read as input, by their names in the store, e.g. land_sea_mask.
        order: of training samples: "global" shuffles them all; "blocks" shuffles blocks of consecutive ones, so that
            neighbours share what is read.
        block: samples of a block, at least 1.
        gaps: where times are missing within a split: "refuse" the data, or "skip" the samples that would need them.
        splits: which samples train, validate and test.
        normalize: subtract the training split's mean and divide by its standard deviation, per channel. Heat is not
            normalised (its score is relative to the value itself).
        noise: heat only: size of the Gaussian noise in the training targets, not negative, in units of what tells the two
            most similar regions apart; the data must have been written with the same (`smoe-hpc data heat --noise`).
        noise_ratio: heat only: how many times larger the noise is in the western half of the domain, above 0.
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
        _check_data(self)

    @property
    def all_leads(self) -> list[int]:
        """Leads that training sees."""
        return [self.lead] if self.leads is None else self.leads


def _check_data(data: Data) -> None:
    """Window, noise and names of a Data section."""
    rules.check_choices(data, "data.")
    rules.require(bool(data.store.strip()), "data.store", data.store, "must be a path, e.g. data.store=data/heat")
    ascending = data.inputs == sorted(set(data.inputs)) and bool(data.inputs) and data.inputs[-1] <= 0
    rules.require(ascending, "data.inputs", data.inputs, "times must ascend and end at or before 0, e.g. [-12,-6,0]")
    rules.require(data.lead > 0, "data.lead", data.lead, "the target must lie after the start, e.g. data.lead=6")
    _check_leads(data)
    rule = "must name each constant once, e.g. data.constants=[orography]"
    rules.require(len(set(data.constants)) == len(data.constants), "data.constants", data.constants, rule)
    rules.check_count("data.block", data.block, 32)
    for key in ("variables", "targets"):
        names = getattr(data, key)
        rule = f"must name at least one channel, each once; data.{key}=null takes all"
        rules.require(names is None or (len(names) > 0 and len(set(names)) == len(names)), f"data.{key}", names, rule)
    rules.check_not_negative("data.noise", data.noise)
    rules.check_positive("data.noise_ratio", data.noise_ratio, 10)


def _check_leads(data: Data) -> None:
    """Leads ascend, and are said in one place."""
    for key in ("leads", "validation_leads"):
        leads = getattr(data, key)
        ascending = leads is None or (leads == sorted(set(leads)) and bool(leads) and leads[0] > 0)
        rules.require(ascending, f"data.{key}", leads, f"times must be positive and ascend, e.g. data.{key}=[72,120]")
    if data.leads is not None:
        rule = f"has no effect beside data.leads={data.leads}; set data.leads=[{data.lead}], or data.leads=null"
        rules.require(data.lead == 1, "data.lead", data.lead, rule)
    if data.lead_mode == "direct":
        rule = "only a model of continuous lead is validated at leads of its own; set it to null, or data.lead_mode=continuous"
        rules.require(data.validation_leads is None, "data.validation_leads", data.validation_leads, rule)
    else:
        rule = "needs leads to draw from; give at least two, e.g. data.leads=[6,12,24,48,72,96,120]"
        rules.require(data.leads is not None and len(data.leads) > 1, "data.lead_mode", data.lead_mode, rule)
