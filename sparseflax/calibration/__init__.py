"""A machine calibrated: layers timed here, and the constants that explain their times."""
