"""Weather-like fields made by a recipe: the channels of the weather experiments where ERA5 is not at hand.

``harmonics`` draws random waves on the sphere and moves them; ``climate`` says what the mean atmosphere, the land and
the seasons are; ``sun`` gives the radiation; ``fields`` puts them together; ``folder`` and ``writing`` make files of them.
Everything about a time follows from (seed, grid, time): no time needs the one before it.
"""

from smoe_hpc.io.synthetic.era5.fields import SyntheticEarth, global_grid
from smoe_hpc.io.synthetic.era5.writing import NOTICE, Written, synthesize

__all__ = ["NOTICE", "SyntheticEarth", "Written", "global_grid", "synthesize"]
