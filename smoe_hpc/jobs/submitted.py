"""What each task of a submitted job does, as submitit starts it: it trains, goes back into the queue, or says what failed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from smoe_hpc import compat
from smoe_hpc.config import load_recipe
from smoe_hpc.errors import SmoeError
from smoe_hpc.launch.stopping import handle_stop_signals
from smoe_hpc.text import printable


def run_task(recipe: Path, run_dir: Path) -> dict[str, Any]:
    """What each task of a submitted job does: its part of the training. The scores, on every rank."""
    import submitit

    with handle_stop_signals():  # from here on, instead of submitit's own handler
        if "SUBMITIT_FOLDER" in os.environ:  # not under "debug"
            submitit.JobEnvironment().paths.result_pickle.unlink(missing_ok=True)  # of a start before this one
        # these bring torch, which takes seconds, and a signal may come in them; who only submits does without
        from smoe_hpc.jobs.queue import Requeued, train_or_requeue
        from smoe_hpc.launch.rendezvous import shutdown
        from smoe_hpc.tasks import make_task

        try:
            loaded = load_recipe(recipe)
            scores = train_or_requeue(loaded, make_task(loaded), run_dir=run_dir)
            values: dict[str, Any] = json.loads(json.dumps(scores))  # as scores.json has it: no types that a reader must load
            return values
        except Requeued as requeued:
            sys.stderr.write(f"{printable(requeued)}\n")
            sys.exit(requeued.exit_status)  # an exception would be the job's result
        except SmoeError as error:
            if "SUBMITIT_FOLDER" not in os.environ:
                raise
            sys.exit(_leave_error(error))
        finally:
            shutdown()


def _leave_error(error: SmoeError) -> int:
    """Leave an error as this task's result and as one line of its log, instead of submitit's traceback; the exit status."""
    import submitit

    compat.leave_outcome(submitit.JobEnvironment().paths.result_pickle, ("error", str(error)))
    status: int = getattr(error, "exit_status", 2)
    sys.stderr.write(f"{'error: ' if status == 2 else ''}{printable(error)}\n")  # a run that stopped as asked is no error
    return status
