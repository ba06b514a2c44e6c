"""What each task of a submitted job does, as submitit starts it: it trains, goes back into the queue, or says what failed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from smoe_hpc.errors import SmoeError


def run_task(recipe: Path, run_dir: Path) -> dict[str, Any]:
    """What each task of a submitted job does: its part of the training. The scores, on every rank."""
    import submitit

    from smoe_hpc.launch.stopping import listening

    with listening():  # from here on, instead of submitit's own handler
        if "SUBMITIT_FOLDER" in os.environ:  # not under "debug"
            submitit.JobEnvironment().paths.result_pickle.unlink(missing_ok=True)  # of a start before this one
        from smoe_hpc.config import load_recipe
        from smoe_hpc.launch.rendezvous import shutdown
        from smoe_hpc.tasks import make_task
        from smoe_hpc.training.queued import Requeued, train_or_requeue

        try:
            loaded = load_recipe(recipe)
            return train_or_requeue(loaded, make_task(loaded), run_dir=run_dir)
        except Requeued as requeued:
            sys.stderr.write(f"{requeued}\n")
            sys.exit(requeued.exit_status)  # an exception would be the job's result
        except SmoeError as error:
            if "SUBMITIT_FOLDER" not in os.environ:
                raise
            sys.exit(_told(error))
        finally:
            shutdown()


def _told(error: SmoeError) -> int:
    """Leave an error as this task's result and as one line of its log, instead of submitit's traceback; the exit status."""
    import submitit
    from submitit.core import utils

    with utils.temporary_save_path(submitit.JobEnvironment().paths.result_pickle) as path:
        utils.cloudpickle_dump(("error", str(error)), path)
    status: int = getattr(error, "exit_status", 2)
    sys.stderr.write(f"{'error: ' if status == 2 else ''}{error}\n")  # a run that stopped as asked is no error
    return status
