"""Times that a test does not look at, taken in no time."""

import pickle

from experiments.benchmark import timing


def hurry(patch, module):
    """The module times what another process would be sent in this one, and each call once a round, of which there is one."""
    def here(*call):
        function, *arguments = pickle.loads(pickle.dumps(call))
        return function(*arguments)

    patch.setattr(module, "afresh", here)
    patch.setattr(timing, "ROUNDS", 1)
    patch.setattr(timing, "BURST", 0.0)
