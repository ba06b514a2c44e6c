"""Layers on a fixed grid: the Spatial Mixture-of-Experts and the other rows of the paper's table.

All map [B, C, H, W] to [B, out, H, W]. For a network of one's own: put :class:`SpatialMoE2d` in, or let
:func:`replace_convolutions` do it, and in the training loop add ``routing_loss(model)`` to the loss.
"""

from smoe_hpc.layers.convolutions.cond_conv import CondConv2d
from smoe_hpc.layers.convolutions.convolution import ChannelBias, Conv2d
from smoe_hpc.layers.convolutions.coord_conv import CoordConv2d
from smoe_hpc.layers.convolutions.locally_connected import LocallyConnected2d
from smoe_hpc.layers.convolutions.low_rank import LowRankLocallyConnected2d
from smoe_hpc.layers.dropout import CounterDropout
from smoe_hpc.layers.gates.auxiliary import AuxiliaryLosses
from smoe_hpc.layers.gates.fixed import FixedGate
from smoe_hpc.layers.gates.gate import Gate
from smoe_hpc.layers.gates.input_gates import InputGate
from smoe_hpc.layers.gates.latent import LatentGate
from smoe_hpc.layers.gates.making import GATES, make_gate
from smoe_hpc.layers.ghost_batch_norm import GhostBatchNorm2d
from smoe_hpc.layers.groups import parameter_groups
from smoe_hpc.layers.replacing.replace import replace_convolutions
from smoe_hpc.layers.replacing.report import ReplacementReport
from smoe_hpc.layers.rules import Damping, RoutingLoss, balanced_quantile
from smoe_hpc.layers.spatial_moe import SpatialMoE2d, spatial_gates, spatial_layers
from smoe_hpc.layers.steps import (
    begin_step,
    end_step,
    hold_routing,
    load_routing_state,
    release_routing,
    routing_loss,
    routing_metrics,
    routing_state,
)

__all__ = [
    "GATES",
    "AuxiliaryLosses",
    "ChannelBias",
    "CondConv2d",
    "Conv2d",
    "CoordConv2d",
    "CounterDropout",
    "Damping",
    "FixedGate",
    "Gate",
    "GhostBatchNorm2d",
    "InputGate",
    "LatentGate",
    "LocallyConnected2d",
    "LowRankLocallyConnected2d",
    "ReplacementReport",
    "RoutingLoss",
    "SpatialMoE2d",
    "balanced_quantile",
    "begin_step",
    "end_step",
    "hold_routing",
    "load_routing_state",
    "make_gate",
    "parameter_groups",
    "release_routing",
    "replace_convolutions",
    "routing_loss",
    "routing_metrics",
    "routing_state",
    "spatial_gates",
    "spatial_layers",
]
