"""Trained networks at work: a run's folder alone is enough, without the data it learned from.

`load_run` reads ``model.json`` and the weights beside it (`network`); `TrainedModel.forecast` takes the fields that a start
needs (`inputs`) and labels what comes out (`labels`); `write_forecasts` writes it piece by piece (`writing`).
"""

from smoe_hpc.inference.trained import TrainedModel, load_run
from smoe_hpc.inference.writing import write_forecasts

__all__ = ["TrainedModel", "load_run", "write_forecasts"]
