"""The operations on NVIDIA GPUs: bindings of the compiled library (:mod:`smoe_hpc.kernels.cuda.library`)."""
