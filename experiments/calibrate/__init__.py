"""The cost model's constants, fitted on this machine, and its errors where it was not fitted."""
