"""Reports: pictures of a run."""

from smoe_hpc.report.pictures import draw_pictures, make_pictures

__all__ = ["draw_pictures", "make_pictures"]
