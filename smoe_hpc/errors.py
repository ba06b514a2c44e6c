"""Errors that a user can act on.

Each says what is wrong, which rule it breaks and what to do about it, in one line. The command prints the line and exits
with status 2; a library user catches :class:`SmoeError`, which is a ``ValueError``. Invariants of our own are asserts.
"""

from __future__ import annotations


class SmoeError(ValueError):
    """What every error of this package derives from."""


class ConfigError(SmoeError):
    """Invalid recipe, override or argument."""


class DataError(SmoeError):
    """A store, data file or grid that is missing, damaged or not the expected one."""


class CheckpointError(SmoeError):
    """A checkpoint that is missing, damaged or belongs to another model."""


class RunError(SmoeError):
    """A run directory that is in use or belongs to another recipe."""


class LaunchError(SmoeError):
    """Processes that were not started the way their environment says."""
