"""Trained networks made faster by one command each, and what that costs by a measure of their own task."""
