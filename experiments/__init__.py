"""Studies behind defaults of the package; run from a checkout, not installed with it (README.md lists them)."""
