"""Experts, gates and batches shared among processes."""
