"""Checks of a store: what it holds, whether it is whole, what its encoding costs."""
