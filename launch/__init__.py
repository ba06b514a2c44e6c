"""How processes start and find each other, and what the machine offers. This room knows no model.

`submit` trains a recipe as a job and returns its `Job`. Beside the Python modules stand the scripts that a person starts:
``quickstart.sh``, ``test.sh`` and ``local_slurm.sh``, and ``environment.sh``, which all of them read.
"""

from smoe_hpc.launch.submission import Job, submit

__all__ = ["Job", "submit"]
