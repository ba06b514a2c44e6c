"""The doctor: what this machine has, what of it will be used, and why."""

from smoe_hpc.launch.doctor.finding import Finding
from smoe_hpc.launch.doctor.machine import inspect_machine, render

__all__ = ["Finding", "inspect_machine", "render"]
