"""The networks that pruning methods are compared on, each a Config of its own; a run of pruning takes about 45 CPU seconds."""

from dataclasses import replace

from experiments.configs import Config, digits
from experiments.models import InceptionNet, ResNet

vgg = replace(digits.config, name="vgg", widths=((32,), (64,), (96, 96), (128, 128)), dense_steps=600, prune_steps=120,
              ramp_steps=80, save_every=120, timing_seconds=6.0)
NETWORKS: dict[str, Config] = {
    "vgg": vgg,
    "resnet": replace(vgg, name="resnet", network=ResNet, widths=((32,), (96,), (128,))),
    "inception": replace(vgg, name="inception", network=InceptionNet, widths=((96,), (192,), (192,))),
}
SPEEDUPS = 1.5, 2.5, 4.0  # requested of every method
BETWEEN = 3.0, 3.5, 4.5, 5.0  # and of the best guided and unguided one, to see where each stops being as accurate as dense
SEEDS = 0, 1, 2

# To see that everything works, in a few minutes, most of which go into compiling: accuracies say nothing.
QUICK = {name: replace(config, widths=widths, dense_steps=40, prune_steps=30, ramp_steps=20, save_every=30, warmup_steps=8,
                       train_images=1000, test_images=250, batch=16, prune_every=5, timing_seconds=1.0)
         for (name, config), widths in zip(NETWORKS.items(), (((16,), (64,), (128,)), ((32,), (96,)), ((128,),)), strict=True)}
QUICK_METHODS = "GMP, uniform", "GMP, guided", "GESL", "OBS one-shot", "OBS one-shot, guided", "speed in the loss"
QUICK_SPEEDUPS = (1.5,)
QUICK_SEEDS = (0,)
