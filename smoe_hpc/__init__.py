"""Spatial Mixture-of-Experts for weather models: the layer, its training on many GPUs, the experiments of the paper.

Importing this package costs nothing: each part is imported by its own name (``smoe_hpc.layers``, ``smoe_hpc.io``, ...).
"""

__version__ = "0.1.0"
