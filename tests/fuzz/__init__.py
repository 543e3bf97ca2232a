"""Files and calls that nobody should trust, by the thousand: each is computed or refused with a documented exception."""
