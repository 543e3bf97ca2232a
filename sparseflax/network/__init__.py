"""A model: its layers surveyed, planned, packed, and its call rewritten for the CPU."""
