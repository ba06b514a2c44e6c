"""The compiled libraries: compilers, building, loading."""
