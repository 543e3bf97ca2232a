"""What a run is: one frozen dataclass, filled in by one module per run. The module's name is the run's."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flax import nnx

from experiments.data import Data


@dataclass(frozen=True)
class Config:
    """Everything that decides the result of a run, besides the machine."""

    name: str
    """Of the run; part of the names of its files."""
    dataset: Callable[..., Data]
    """(seed, train_images, test_images) -> Data of what is made here, (folder) -> Data of what lies in files."""
    network: Callable[..., nnx.Module]
    """(widths, channels, classes, rngs=) -> model."""
    widths: tuple[tuple[int, ...], ...]
    """Channels of the network's convolutions or blocks, by stage."""
    dense_steps: int
    """Updates of dense training."""
    prune_steps: int
    """Updates of pruning and of recovering from it."""
    ramp_steps: int
    """Updates, of prune_steps, in which the densities fall to their targets."""
    save_every: int
    """Updates between two checkpoints; each also evaluates the network."""
    seed: int = 0
    """Decides the data, the initial weights and the order of the examples."""
    folder: Path | None = None
    """Of a data set that lies in files; what is made here needs none."""
    train_images: int = 16_000
    test_images: int = 2_000
    """Of what is made here; of files, all are taken."""
    classes: int = 10
    batch: int = 32
    """Examples per update."""
    warmup_steps: int = 80
    """Updates in which the learning rate rises from zero to its peak; a cosine then takes it to its end."""
    peak_lr: float = 0.1
    """Highest learning rate of dense training."""
    end_lr: float = 1e-3
    """Learning rate at the end of dense training."""
    prune_peak_lr: float = 0.05
    """Learning rate at the start of pruning; held until the ramp ends."""
    prune_end_lr: float = 5e-4
    """Learning rate at the end of pruning."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    """Of all parameters, added to the gradient before momentum."""
    speedup: float = 3.0
    """Requested of the whole network at batch 1 on this machine."""
    points: float | None = None
    """Percentage points of test accuracy that it may cost; where it costs more, less speed is tried. None: no bound."""
    method: str = "GMP, guided"
    """A name in experiments/methods.py."""
    prune_every: int = 10
    """Updates between two takings of the masks."""
    block: int = 1
    """Neighbouring input channels that are pruned together: 4 for a network that is to run in eight bits."""
    processes: int = 1
    """That train together on this host, each on a share of every batch; docs/how-to/cluster.md has many hosts."""
    timing_seconds: float = 10.0
    """For which networks are timed in turn, before and after: on two threads the ratio of two medians of 2 s varies by 7 %, of
    10 s by 4 %."""
    out: Path | None = None
    """Folder of the run; runs/<name>-seed<seed> by default. The same command with the same folder goes on where it stopped."""
    results: Path | None = None
    """File of JSON lines to append the result to, such as experiments/results/digits.jsonl."""

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_steps < self.dense_steps:
            raise ValueError(f"warmup_steps={self.warmup_steps}, wanted 0 or more, and fewer than "
                             f"dense_steps={self.dense_steps}")

    def data(self) -> Data:
        """What the run learns from."""
        if self.folder is None:
            return self.dataset(self.seed, self.train_images, self.test_images)
        return self.dataset(self.folder)
