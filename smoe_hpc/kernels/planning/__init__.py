"""Plans of a routing: what the pixels of each window of the grid select."""
