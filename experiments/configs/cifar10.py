"""A VGG on CIFAR-10, with the usual augmentation: squares out of padded images, mirrored half the time.

    pip install -e '.[data]'
    python -m experiments.run cifar10 --folder DIR        DIR holds cifar-10-batches-bin, its binary version

40 epochs dense and 40 of pruning. Not run by us to the end, for want of the data where this was written: networks of this
kind reach 92 to 94 % when trained so long. About a day on two cores.
"""

from dataclasses import replace
from pathlib import Path

from experiments.configs import digits
from experiments.data import cifar10

EPOCH = 50_000 // 128

config = replace(
    digits.config,
    name="cifar10",
    dataset=cifar10,
    folder=Path("data"),
    widths=((64, 64), (128, 128), (256, 256), (256, 256)),
    batch=128,
    dense_steps=40 * EPOCH,
    prune_steps=40 * EPOCH,
    ramp_steps=20 * EPOCH,
    warmup_steps=2 * EPOCH,
    prune_every=100,
    save_every=2 * EPOCH,
)
