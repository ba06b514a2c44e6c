"""Turning the convolutions of a network into SMoE layers."""
