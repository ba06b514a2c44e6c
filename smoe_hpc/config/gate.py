"""The gate section of a recipe's model.

Dimensions: N experts (|E| of the paper), K selected experts (E of the paper), H latitude rows, W longitude columns. "Paper"
is Dryden and Hoefler, Spatial Mixture-of-Experts, NeurIPS 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from smoe_hpc.config import rules


@dataclass(frozen=True)
class Gate:
    """Which experts work where (paper, "Gating").

    Attributes:
        kind: "latent" is a learned tensor [N, H, W], independent of the input (the paper's tensor routing); "conv",
            "coordconv", "coordconv_multi", "lcn" and "linear" read the layer's input; "fixed" is the true region map (heat
            only).
        softmax: softmax over the experts.
        absolute: absolute value of the gate.
        noise: Gaussian noise with standard deviation 1/N while training: "shared" draws one map for all samples,
            "per_sample" one for each.
        region_map: the true region map as a further gate input (heat only; "fixed" uses the map in any case).
        share: one gate for all layers of the network, which must then agree in N and K.
    """

    kind: Literal["latent", "conv", "coordconv", "coordconv_multi", "lcn", "linear", "fixed"] = "latent"
    softmax: bool = False
    absolute: bool = False
    noise: Literal["none", "shared", "per_sample"] = "none"
    region_map: bool = False
    share: bool = False

    def __post_init__(self) -> None:
        rules.check_choices(self, "model.gate.")
        if self.kind == "latent":
            rule = "a latent gate reads no input, so no map either; set model.gate.kind=conv (or lcn, ...)"
            rules.require(not self.region_map, "model.gate.region_map", self.region_map, rule)
        if self.kind == "fixed":
            rule = "a fixed gate has no values to change; set model.gate.{}={} or another model.gate.kind"
            rules.require(self.noise == "none", "model.gate.noise", self.noise, rule.format("noise", "none"))
            rules.require(not self.softmax, "model.gate.softmax", self.softmax, rule.format("softmax", "false"))
            rules.require(not self.absolute, "model.gate.absolute", self.absolute, rule.format("absolute", "false"))

    @property
    def reads_input(self) -> bool:
        """Whether the gate's values depend on the layer's input."""
        return self.kind not in ("latent", "fixed")
