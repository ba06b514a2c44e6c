"""Errors that a user can act on.

Each says what is wrong, which rule it breaks and what to do about it, in one line. The command prints the line and exits
with status 2; a library user catches :class:`SmoeError`, which is a ``ValueError``. Invariants of our own are asserts.
"""

from __future__ import annotations


class SmoeError(ValueError):
    """What every error of this package derives from."""


class ConfigError(SmoeError):
    """A recipe, an override or an argument that cannot be."""


class DataError(SmoeError):
    """A store, a file of data or a grid that is missing, damaged or another than expected."""


class CheckpointError(SmoeError):
    """A checkpoint that is missing, damaged or of another model."""


class RunError(SmoeError):
    """A run directory that is in use or belongs to another recipe."""


class LaunchError(SmoeError):
    """Processes that were not started as they say they were."""
