"""GoogLeNet on ImageNet, pruned by GESL with the paper's hyper-parameters.

    pip install -e '.[data]'
    python -m experiments.run googlenet --folder DIR      DIR holds train and val, each with a folder per class

Park et al., ICLR 2017: as for caffenet, but 900,000 updates until pruning saturates and 300,000 to recover. Expect what they
published: 68.9 % top-1 dense and 68.66 % pruned, with 1 to 18 % of the weights of 3x3 and 5x5 convolutions kept. There, no
1x1 convolution was worth pruning; which ones are on this machine, the guide says when the run begins. Weeks on two cores.

Where it differs: as for caffenet; and we train without auxiliary classifiers, so the dense network may lose some points.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from experiments.configs import caffenet
from experiments.data import image_folder


def network(widths: Any, channels: int, classes: int, *, rngs: Any) -> Any:
    """GoogLeNet for images of 224x224."""
    from experiments.models import GoogLeNet

    return GoogLeNet(classes, rngs=rngs)


config = replace(
    caffenet.config,
    name="googlenet",
    dataset=partial(image_folder, side=224),
    network=network,
    batch=32,
    dense_steps=2_400_000,
    prune_steps=1_200_000,
    ramp_steps=900_000,
)
