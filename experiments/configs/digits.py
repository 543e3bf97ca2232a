"""A small VGG on cluttered digits.

    python -m experiments.run digits
"""

from experiments.configs import Config
from experiments.data import cluttered_digits
from experiments.models import VGG

config = Config(
    name="digits",
    dataset=cluttered_digits,
    network=VGG,
    widths=((32,), (64,), (128, 128), (192, 192)),
    dense_steps=600,
    prune_steps=500,
    ramp_steps=300,
    save_every=100,
)
