"""How fast it is: ours against every rival found, in one run, on the same threads, with outputs compared."""
