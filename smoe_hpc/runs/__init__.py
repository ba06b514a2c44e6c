"""A run's folder: the only room that knows its files, read without torch and without trust.

`layout` has the names, `directory` what may be written there and what came out, `standing` where runs stand for somebody who
only looks. A folder that somebody else made, or damaged, is reported as one.
"""

from smoe_hpc.runs.scores import Scores, Selection
from smoe_hpc.runs.standing import Standing, standing, standings

__all__ = ["Scores", "Selection", "Standing", "standing", "standings"]
