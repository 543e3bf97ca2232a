"""Guided sparsity learning by lasso and surgery in float64 NumPy: plain loops that share no code with the library."""

import numpy as np

SHAPES = {"a": (3, 3, 4, 5), "b": (1, 1, 7, 9), "c": (12, 6)}


def make_params(seed=0):
    """A Linen-like tree of float32 weights, from which gradients are made too."""
    rng = np.random.default_rng(seed)
    return {name: {"kernel": rng.normal(size=shape).astype(np.float32), "bias": np.ones(shape[-1], np.float32)}
            for name, shape in SHAPES.items()}


def kernel(tree, name):
    return np.asarray(tree[name]["kernel"], np.float64).reshape(-1)


def largest(weights, count):
    mask = np.zeros(weights.size, bool)
    mask[np.argsort(-np.abs(weights), kind="stable")[:count]] = True
    return mask


def simulate(method, guide, steps, *, learning_rate, ramp, patience, start, rate=0.1):
    """Yields ({layer: weights}, {layer: mask}, pressure, {layers that left}) after each of `steps` updates by SGD.

    Args:
      method: "lasso" or "surgery".
      guide: {layer: dict(density, lower, upper, strength, slope, saves)}.
      ramp: (begin, end) of the cubic ramp.
      start: the lasso's strength, the surgery's threshold.
    """
    begin, end = ramp
    dense = {name: kernel(make_params(), name) for name in guide}  # of lasso: as pruning began; of surgery: the shadow
    weights = {name: w.copy() for name, w in dense.items()}
    masks = {name: np.ones(w.size, bool) for name, w in weights.items()}
    left, pressure, age = set(), 1.0, 0
    for step in range(1, steps + 1):
        fraction = 1 - (1 - np.clip((step - begin) / (end - begin), 0, 1)) ** 3
        full = fraction >= 1
        age += fraction > 0
        leaves = {name for name, layer in guide.items() if fraction > 0 and name not in left
                  and (full or patience and age % patience == 0) and masks[name].mean() > layer["upper"]}
        left |= leaves
        excess = sum(guide[name]["saves"] for name in left)
        room = sum(layer["slope"] * layer["density"] for name, layer in guide.items()
                   if name not in left and layer["density"] > layer["lower"])
        factor = max(0.5, 1 - excess / room) if room else 1
        target = {name: round(max(layer["lower"], layer["density"] * factor) * masks[name].size)
                  for name, layer in guide.items()}
        kept = sum(int(masks[name].sum()) for name in guide if name not in left)
        wanted = sum(masks[name].size - fraction * (masks[name].size - target[name]) for name in guide if name not in left)
        if 0 < fraction < 1:
            pressure *= np.clip(kept / max(wanted, 1), 1 / (1 + rate), 1 + rate)

        for name, layer in guide.items():
            update = -learning_rate * kernel(make_params(100 + step), name)
            old, push = masks[name], pressure * layer["strength"]
            if method == "surgery":
                dense[name] += update
                w = dense[name]
                keep = np.abs(w) > start * push * np.abs(w).mean() * np.where(old, 0.9, 1.1)
                shrunk = w
            else:
                w = weights[name] + update
                keep = np.abs(w) > start * push
                shrunk = np.sign(w) * np.maximum(np.abs(w) - start * push, 0)
                if fraction == 0:
                    dense[name] = w
            if name in leaves:
                masks[name] = np.ones(w.size, bool)
                weights[name] = dense[name].copy()
            elif fraction == 0 or name in left or old.sum() <= target[name]:
                weights[name] = np.where(old, w, 0)
            elif full or keep.sum() <= target[name]:
                masks[name] = largest(w, target[name])
                weights[name] = np.where(masks[name], w, 0)
            else:
                masks[name] = keep
                weights[name] = np.where(keep, shrunk, 0)
        yield ({name: w.copy() for name, w in weights.items()}, {name: mask.copy() for name, mask in masks.items()},
               pressure, set(left))
