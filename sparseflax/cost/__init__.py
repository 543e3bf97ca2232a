"""How long it takes: the sizes of a layer, what a kernel does for it, what a machine needs for that."""
