"""The loader measured beside what a user would use instead."""
