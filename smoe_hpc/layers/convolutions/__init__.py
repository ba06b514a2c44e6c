"""The convolutions of the paper's table: one filter everywhere, one filter a pixel, or a mixture."""
