"""Programs that print what gnsfx costs and how right it is. Each has ``--help``; results are in ``results/``."""
