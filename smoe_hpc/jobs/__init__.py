"""Whole runs: one in the processes of this job, several compared, one submitted as a job of a queue.

`submit` trains a recipe as a job and returns its `Job`, without torch. What such a job and the command run is
`queue.train_or_requeue`, which stands on `smoe_hpc.training`; `compare.compare` trains several recipes one after another, and
`quickstart.run` is the first minutes of a user.
"""

from smoe_hpc.jobs.job import Job
from smoe_hpc.jobs.submission import submit

__all__ = ["Job", "submit"]
