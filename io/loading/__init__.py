"""Batches for training and evaluation: from numbers of samples to tensors on the device."""
