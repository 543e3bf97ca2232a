"""Everything that `digits` does, as small as it can be: seconds, and no accuracy to speak of. The tests run it.

    python -m experiments.run smoke
"""

from dataclasses import replace

from experiments.configs import digits

config = replace(
    digits.config,
    name="smoke",
    widths=((16,), (32,)),
    dense_steps=12,
    prune_steps=12,
    ramp_steps=8,
    save_every=6,
    train_images=256,
    test_images=128,
    batch=16,
    warmup_steps=4,
    speedup=1.2,
    prune_every=2,
    timing_seconds=0.25,
)
