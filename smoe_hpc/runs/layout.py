"""The names in a run's folder. Whoever writes or reads a file of a run takes its name from here.

::

    config.yaml          the resolved recipe
    lock                 held by rank 0 while it trains; says who holds it
    metrics.jsonl        a line per step, epoch and validation; repeats to the bit
    timing.jsonl         how fast; does not
    tensorboard/         what metrics.jsonl has, as event files
    checkpoints/         step_N; checkpoints.json beside it notes the newest step that was saved
    finished.json        why training ended, where, on which data, the best step, checksums of the two below
    scores.json          {split: {region: {score: value}}}
    weights.safetensors  of the best checkpoint
    model.json           what the network takes and gives; fixed_fields.safetensors: its constant inputs
    pictures/            PNG files
    jobs/                what was submitted: recipes, and the files of submitit's jobs
"""

from __future__ import annotations

CONFIG = "config.yaml"
LOCK = "lock"
METRICS = "metrics.jsonl"
TIMING = "timing.jsonl"
TENSORBOARD = "tensorboard"
CHECKPOINTS = "checkpoints"
FINISHED = "finished.json"
SCORES = "scores.json"
WEIGHTS = "weights.safetensors"
MODEL = "model.json"
FIXED_FIELDS = "fixed_fields.safetensors"
PICTURES = "pictures"
JOBS = "jobs"

CUT = ".cut"
"""Ends the name of a file that holds the lines cut from the end of the one it is named after, until they are replaced."""
PARTIAL = ".*.partial"
"""Pattern of files that were being written when their process was killed."""
STEP = "step_"
"""Begins the name of a checkpoint."""
SUBMISSION, RESULT = "_submission.sh", "_result.pkl"
"""End the names of files in jobs/: <job>_submission.sh of a Slurm job, <job>_<rank>_result.pkl of what a rank left."""
