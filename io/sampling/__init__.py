"""Which stored fields make a sample, in which order samples come, and how they are shared out to splits and ranks."""
