"""Benchmarks and studies: what is measured here is what the documentation may claim."""
