"""What is computed once from a store and kept: mean and standard deviation, climatology."""
