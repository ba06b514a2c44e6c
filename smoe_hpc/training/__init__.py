"""Training: DeepSpeed's engine, the loop, the run directory, checkpoints that are exact to resume.

`train` runs a recipe's task to the end and returns its scores, `train_or_requeue` does so as a job of a queue; `evaluate`
scores a run's best checkpoint. DeepSpeed takes seconds to import and is imported when a run begins.
"""

from smoe_hpc.training.evaluate import evaluate
from smoe_hpc.training.queued import train_or_requeue
from smoe_hpc.training.run import train
from smoe_hpc.training.run_directory import RunDirectory
from smoe_hpc.training.signals import RunInterrupted
from smoe_hpc.training.task import Scores, Task

__all__ = ["RunDirectory", "RunInterrupted", "Scores", "Task", "evaluate", "train", "train_or_requeue"]
