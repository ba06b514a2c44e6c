"""How processes start and find each other, and what the machine offers. This room knows no model.

Beside the Python modules stand the scripts that a person starts: ``quickstart.sh`` and ``test.sh``, and
``environment.sh``, which both of them read.
"""
