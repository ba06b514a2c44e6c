"""Training: from a recipe and its task to scores, exact to resume after any step.

The way of a run, in order:

1. `processes.py` finds the ranks, and rank 0 locks the run's folder (`smoe_hpc.runs.directory`), refuses one that belongs to
   another recipe, and returns the scores of a run that has already ended (`run.py`).
2. The newest whole checkpoint (`checkpoint/`) gives the position of the run and, through `state.py`, the tensors of the model,
   its routing and its optimiser (`optimizers.py`), around which `engine.py` puts DeepSpeed.
3. `loop.py` makes the steps: it takes batches (`batches.py`), calls the engine, notes losses and routing (`metrics.py`), shows
   progress (`progress.py`), and lets all ranks agree to save or to stop (`signals.py`).
4. After an epoch, or as the recipe says, `scoring.py` scores the validation split, `smoe_hpc.runs.schedule` decides whether
   learning rates fall or training ends, and the loop saves a checkpoint.
5. At the end the best checkpoint is scored on validation and test, weights, scores and the note that the run has ended are
   written, and the caller's `draw` makes the pictures (`run.py`).

An error of one rank on this way reaches all of them (`failures.py`). `evaluate` scores a run's best checkpoint again. DeepSpeed
takes seconds to import and is imported when a run begins.
"""

from smoe_hpc.training.evaluate import evaluate
from smoe_hpc.training.run import train
from smoe_hpc.training.signals import RunInterrupted
from smoe_hpc.training.task import Task

__all__ = ["RunInterrupted", "Task", "evaluate", "train"]
