"""``python -m smoe_hpc`` is the command ``smoe-hpc``."""

from smoe_hpc.cli import main

if __name__ == "__main__":
    main()
