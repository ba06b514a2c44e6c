"""Ways of bringing stored fields in, all alike from outside: the same samples in the same order, to the bit.

A front delivers raw batches, which one decoder turns into tensors: :mod:`plain` reads in threads of this process,
:mod:`dali` in processes of NVIDIA DALI. Nothing is imported here: DALI's processes import only what they need.
"""
