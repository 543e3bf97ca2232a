"""CaffeNet, the AlexNet of the paper, on ImageNet, pruned by GESL with the paper's hyper-parameters.

    pip install -e '.[data]'
    python -m experiments.run caffenet --folder DIR       DIR holds train and val, each with a folder per class

Park et al., ICLR 2017: mini-batches of 256, learning rate 1e-3 while pruning and a tenth of it at the end, 450,000 updates
until pruning saturates and 150,000 to recover. Expect what they published: 57.4 % top-1 dense and 57.48 % pruned, with 14,
7, 8 and 12 % of the weights of conv2 to conv5 kept, and conv1 dense. Weeks on two cores: it is for a large machine.

Where it differs: they started from BVLC's trained weights, we train them (with its hyper-parameters); learning rates fall
along a cosine, not in steps ("does not significantly affect the eventual accuracy and sparsity", they say); weight decay
is 5e-4 on all parameters, as in BVLC's training, and the lasso's strength, 5e-5 in the paper, adapts to the requested
speedup; no dropout.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from experiments.configs import digits
from experiments.data import image_folder


def network(widths: Any, channels: int, classes: int, *, rngs: Any) -> Any:
    """CaffeNet for images of 227x227."""
    from experiments.models import AlexNet

    return AlexNet(classes, rngs=rngs)


config = replace(
    digits.config,
    name="caffenet",
    dataset=partial(image_folder, side=227),
    folder=Path("imagenet"),
    network=network,
    widths=(),
    classes=1000,
    batch=256,
    dense_steps=450_000,
    warmup_steps=0,
    peak_lr=0.01,
    end_lr=1e-5,
    method="GESL",
    prune_steps=600_000,
    ramp_steps=450_000,
    prune_every=1000,
    prune_peak_lr=1e-3,
    prune_end_lr=1e-4,
    save_every=5000,
)
