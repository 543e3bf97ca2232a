"""How a network learns: a loop that goes on, bit for bit, where it was killed."""

import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from experiments import checkpoint, parallel
from experiments.data.dataset import Data, Images
from sparseflax import prune
from sparseflax.cost.progress import progress

CURVES = "losses", "accuracies", "densities"
DENSITIES = 5  # times that densities are recorded between two checkpoints


class TrainState(NamedTuple):
    """All that one step hands to the next: nested dicts of arrays, and the optimizer's state over the same tree."""

    params: Any
    statistics: Any
    optimizer: Any


class Trained(NamedTuple):
    """What training leaves behind besides the model.

    Attributes:
      optimizer: the optax state, with the masks in it where something was pruned.
      losses: mean training loss of every `save_every` steps, as (steps done, loss).
      accuracies: test accuracy in [0, 1] at the same moments, as (steps done, accuracy).
      densities: kept / all weights of every kernel that has lost some, as (steps done, {layer: density}), DENSITIES times as
        often.
    """

    optimizer: Any
    losses: list[tuple[int, float]]
    accuracies: list[tuple[int, float]]
    densities: list[tuple[int, dict[str, float]]]


def fit(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    data: Data,
    *,
    title: str,
    folder: Path,
    seed: int,
    batch: int,
    steps: int,
    first_step: int = 0,
    save_every: int,
    mesh: Mesh | None = None,
) -> Trained:
    """Train a model, in place, for `steps` updates; a run that was killed goes on from its newest checkpoint.

    What comes out depends on the arguments only, not on how often the run was killed.

    Args:
      model: of parameters and batch statistics; logits from images (n, h, w, c).
      optimizer: whatever prunes, last in its chain.
      data: images and labels.
      title: for the progress bar and errors.
      folder: for the checkpoints of this training and no other.
      seed: decides the order of the examples, with `first_step`.
      batch: examples per update.
      steps: updates to make.
      first_step: updates made by trainings before this one; the examples go on from there.
      save_every: updates between two checkpoints.
      mesh: of the devices that share each batch, from `parallel.mesh_of_all` in every process; None takes JAX's default device.

    Raises:
      FloatingPointError: the loss is not finite, or a parameter after the update; the last good checkpoint stays.
      ValueError: no steps, fewer steps than a checkpoint in the folder has, a damaged checkpoint, two pruning methods over one
        layer, or devices that do not divide the batch.
    """
    if min(steps, save_every) < 1:
        raise ValueError(f"{title} of steps={steps} with save_every={save_every}, wanted at least 1 of both")
    model.train()
    graphdef, params, statistics = nnx.split(model, nnx.Param, nnx.BatchStat)
    params, statistics = nnx.to_pure_dict(params), nnx.to_pure_dict(statistics)
    state = TrainState(params, statistics, optimizer.init(params))
    prune.masks(state.optimizer)  # raises where two methods prune the same layer
    take_step, own = _step, lambda tree: tree
    if mesh is not None:
        parallel.check_batch(mesh.size, batch)
        state = parallel.everywhere(mesh, state)
        take_step = jax.jit(_next, static_argnums=(0, 1), out_shardings=parallel.on_all(mesh))
        own = partial(jax.tree.map, np.asarray)  # a process computes with arrays of its own again
    done, losses, accuracies, densities = 0, [], [], []
    if found := checkpoint.restore(folder, state):
        done, state, note = found
        losses, accuracies, densities = ([tuple(point) for point in note[curve]] for curve in CURVES)
    if done > steps:
        raise ValueError(f"{folder} holds {title} of {done} steps, wanted at most {steps}: choose another out, or delete it")
    recent = []
    tells = jax.process_index() == 0  # of many processes, the first
    with progress(title, steps, done) if tells else nullcontext(lambda done, text: None) as advance:
        while done < steps:
            images, labels = data.train_batch(seed, first_step + done, batch)
            if mesh is not None:
                images, labels = parallel.rows(mesh, images), parallel.rows(mesh, labels)
            loss, norm, state = take_step(graphdef, optimizer, state, images, labels)
            done, loss, norm = done + 1, float(loss), float(norm)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise FloatingPointError(_diverged(title, done, loss, norm, folder))
            recent.append(loss)
            advance(done, f"loss {loss:.3f}")
            if done % max(1, save_every // DENSITIES) == 0 or done == steps:
                densities.append((done, _densities(state.params)))
            if done % save_every == 0 or done == steps:
                losses.append((done, float(np.mean(recent))))
                recent = []
                nnx.update(model, own(state.params), own(state.statistics))
                accuracies.append((done, accuracy(model, data.test_images, data.test_labels)))
                curves = losses, accuracies, densities
                checkpoint.save(folder, done, state, dict(zip(CURVES, curves, strict=True)))
    nnx.update(model, own(state.params), own(state.statistics))
    model.eval()
    return Trained(own(state.optimizer), losses, accuracies, densities)


def accuracy(model: nnx.Module, images: Images, labels: np.ndarray, batch: int = 250) -> float:
    """Share of the images (n, h, w, c) whose largest logit is their label's (n,); the model is left in evaluation mode."""
    model.eval()
    right = [np.asarray(_predict(model, images[i : i + batch])) == labels[i : i + batch] for i in range(0, len(images), batch)]
    return float(np.mean(np.concatenate(right)))


def _densities(params: Any) -> dict[str, float]:
    shares = {layer: int(np.count_nonzero(kernel)) / kernel.size for layer, kernel in prune.kernels(params).items()}
    return {layer: share for layer, share in shares.items() if share < 1}


@nnx.jit
def _predict(model, images):
    return model(images).argmax(axis=-1)


def _next(graphdef, optimizer, state, images, labels):
    """(loss, norm of the parameters after the update, next state)."""

    def loss_of(params):
        model = nnx.merge(graphdef, params, state.statistics)
        loss = optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()
        return loss, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    (loss, statistics), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    return loss, optax.tree.norm(params), TrainState(params, statistics, optimizer_state)


_step = jax.jit(_next, static_argnums=(0, 1))


def _diverged(title: str, step: int, loss: float, norm: float, folder: Path) -> str:
    good = sorted(folder.glob("[0-9]*.json"))
    last = f"the last good checkpoint, of step {int(good[-1].stem)}, stays in {folder}" if good else "none was written yet"
    return (f"{title} diverged at step {step}: loss {loss}, norm of the updated parameters {norm}, wanted finite numbers; "
            f"{last}. Choose a lower peak_lr, or prune_peak_lr, and another out.")
