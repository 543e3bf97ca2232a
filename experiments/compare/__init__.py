"""Pruning methods against each other, on one page: accuracy, size, and time as measured. See `__main__`."""
