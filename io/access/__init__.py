"""Access to files that may come from anybody: what they are, what in them may be read, how many stay open."""
