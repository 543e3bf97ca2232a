"""torch.compile, channels-last, with its weights frozen so that it may store them as it likes. It compiles for minutes."""

from __future__ import annotations

import numpy as np

from experiments.baselines import Rival, onednn

needs = ("torch",)


def network(model: bytes, x: np.ndarray, threads: int) -> list[Rival]:
    import torch

    return [onednn.on_images("torch compiled", torch.compile(onednn.load(model, threads), options={"freezing": True}), x)]
