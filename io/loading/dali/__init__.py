"""Reading in processes of NVIDIA DALI."""
