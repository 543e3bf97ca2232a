"""In and out: packed networks and exported programs as files."""
