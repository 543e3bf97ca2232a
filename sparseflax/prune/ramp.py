"""How fast to prune: the fraction of the way from dense to the wanted density, as an optax schedule."""

from __future__ import annotations

import optax


def ramp(begin: int, end: int, *, total: int | None = None, power: int = 3) -> optax.Schedule:
    """Fraction of the pruning done after a number of steps: 0 up to `begin`, 1 from `end` on, fast first and slow last.

        fraction(step) = 1 - (1 - (step - begin) / (end - begin)) ** power
        density(step)  = 1 - (1 - target) * fraction(step)

    Args:
      begin: optimizer steps before anything is pruned.
      end: optimizer steps after which the target is reached; train on after it, with fixed masks, to recover.
      total: optimizer steps of the whole training, to have it checked that the ramp fits.
      power: 3 is the cubic ramp of Zhu and Gupta, "To prune, or not to prune" (2017); 1 is linear.

    Raises:
      ValueError: for a ramp that ends before it begins, or after the training.
    """
    if not 0 <= begin < end:
        raise ValueError(f"a ramp needs 0 <= begin < end, got begin={begin}, end={end}")
    if total is not None and total < end:
        raise ValueError(f"the ramp ends after {end} steps but training has only {total}: train longer or ramp faster")
    return optax.polynomial_schedule(0.0, 1.0, power, transition_steps=end - begin, transition_begin=begin)
