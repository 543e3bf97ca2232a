"""What sparsity is worth on this machine, from the command line.

    python -m sparseflax calibrate                                  # a minute, once: what this machine's kernels take
    python -m sparseflax machine server.json                        # this machine as a file, for a plan elsewhere
    python -m sparseflax plan network.onnx --machine server.json    # what would run sparse there
    python -m sparseflax plan network.onnx                          # what of a network would run sparse, and why
    python -m sparseflax plan my.module:network --speedup 2.5       # which of its layers to prune, and how far, for that
    python -m sparseflax bench network.onnx --speedup 2.5           # pruned like that and timed, whatever it then computes
    python -m sparseflax bench network.onnx --density 0.1 --steps   # and where its time goes, predicted beside measured
    python -m sparseflax faster network.onnx --images DIR --speedup 2     # pruned for that by pictures, written, with a report

A network is an ONNX file, or `module:function`: a function without arguments that returns a model, or a pair (model, x) with
its input; a model is an nnx module or a pair (Linen module, variables).
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

PICTURED = 25  # steps


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sparseflax", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="calibrate | machine | plan | bench | faster")
    calibrate = commands.add_parser("calibrate", help="measure this machine, and store what `detect_machine` finds")
    calibrate.add_argument("--seconds", type=float, default=50.0, help="for measuring (default: %(default)g)")
    calibrate.add_argument("--isa", help="instruction set of the sparse kernel (default: the best that runs here)")
    machine = commands.add_parser("machine", help="write what `detect_machine` finds here, for plans elsewhere")
    machine.add_argument("file", help="to write, JSON")
    plan = commands.add_parser("plan", help="dense or sparse for every layer, and why; with --speedup, what to prune")
    plan.add_argument("--measure", action="store_true", help="time every layer both ways instead of predicting")
    plan.add_argument("--machine", metavar="FILE", help="where it will run, written there by `machine` (default: this one)")
    bench = commands.add_parser("bench", help="time a network dense and packed")
    bench.add_argument("--density", type=float, help="prune every layer to it first, by magnitude, for the timing alone")
    bench.add_argument("--seconds", type=float, default=5.0, help="for timing (default: %(default)g)")
    bench.add_argument("--steps", action="store_true", help="of the packed network, each predicted and measured")
    bench.add_argument("--svg", type=Path, metavar="FILE", help="to write the longest of these steps to, as bars")
    for command in (plan, bench):
        command.add_argument("network", help="an ONNX file, or module:function")
        command.add_argument("--batch", type=int, default=1, help="images in the batch (default: %(default)s)")
        command.add_argument("--shape", type=_sizes, metavar="H,W,C", help="of one input, where the network leaves it open")
        command.add_argument("--speedup", type=float, help="over the dense network: prune as a guide for that would")
    faster = commands.add_parser("faster", help="prune an ONNX network by pictures until it is as fast as asked")
    faster.add_argument("network", help="an ONNX file")
    faster.add_argument("--images", required=True, metavar="DIR", help="a folder of pictures of the kind that it will see")
    faster.add_argument("--speedup", type=float, help="over the dense network")
    faster.add_argument("--milliseconds", type=float, help="for a call, in place of a speedup")
    faster.add_argument("--points", type=float, help="that may be lost, percent: of the same top answers, with --labels of "
                        "accuracy, of relative error where there are no answers")
    faster.add_argument("--labels", metavar="FILE", help="lines picture,class")
    faster.add_argument("--precision", choices=("float32", "int8"), default="float32",
                        help="int8: in eight bits what is faster so, pruned in blocks of four (default: %(default)s)")
    faster.add_argument("--finetune", type=float, default=0.0, metavar="MINUTES",
                        help="of training against the original's outputs, for each network that is tried (default: none)")
    faster.add_argument("--out", metavar="DIR", help="(default: the network's name and -faster)")
    faster.add_argument("--like", metavar="DIR", help="of a job for a network of the same layers, whose measurements are taken")
    faster.add_argument("--batch", type=int, default=1, help="images in a call (default: %(default)s)")
    faster.add_argument("--size", type=_sizes, metavar="H,W", help="of the pictures, where the network leaves it open")
    for name, default in (("mean", (0.0,)), ("std", (1.0,))):
        faster.add_argument(f"--{name}", type=_numbers, default=default, metavar="R,G,B",
                            help=f"inputs are (pixel / 255 - mean) / std (default: {default[0]:g})")
    faster.add_argument("--seconds", type=float, default=15.0, help="of measuring, before and after (default: %(default)g)")
    for command in (calibrate, machine, plan, bench, faster):
        command.add_argument("--threads", type=int, help="of JAX's CPU client (default: as many as there are CPUs)")
    args = parser.parse_args()
    if args.threads:
        os.environ["NPROC"] = str(args.threads)  # before JAX makes its client
    try:
        {"calibrate": _calibrate, "machine": _machine, "plan": _plan, "bench": _bench, "faster": _faster}[args.command](args)
    except (ImportError, OSError, TypeError, ValueError) as error:
        parser.exit(2, f"{parser.prog} {args.command}: {error}\n")


def _calibrate(args: argparse.Namespace) -> None:
    from sparseflax.calibration.calibrate import calibrate
    from sparseflax.cost.profile import path

    machine = calibrate(args.seconds, args.isa)
    print(machine)
    if (file := path(machine.name, machine.isa, machine.threads)).exists():
        print(f"stored {file}")


def _machine(args: argparse.Namespace) -> None:
    import sparseflax

    machine = sparseflax.detect_machine()
    sparseflax.save_machine(args.file, machine)
    print(f"{machine}\nwritten to {args.file}")


def _plan(args: argparse.Namespace) -> None:
    import sparseflax

    machine = sparseflax.load_machine(args.machine) if args.machine else None
    model, x = read(args.network, args.batch, args.shape)
    if args.measure and args.speedup is not None:
        raise ValueError("--measure times the network as it is, --speedup says how to prune it, wanted one of them")
    if args.speedup is None:
        print(sparseflax.plan(model, x, machine, measure=args.measure))
    else:
        print(_guide(model, x, args.speedup, machine))


def _bench(args: argparse.Namespace) -> None:
    import sparseflax
    from sparseflax.cost.atomic import write_atomically
    from sparseflax.cost.timing import in_turn
    from sparseflax.network.measure import program
    from sparseflax.network.steps import step_times
    from sparseflax.prune.measure import pruned

    model, x = read(args.network, args.batch, args.shape)
    if args.density is not None and args.speedup is not None:
        raise ValueError("--density and --speedup both say how far to prune, wanted one of them")
    small = model
    if args.speedup is not None:
        guide = _guide(model, x, args.speedup)
        print(f"{guide}\n")
        small = pruned(model, guide.densities)
    elif args.density is not None:
        small = pruned(model, {path: args.density for path in sparseflax.conv_shapes(model, x)})
    plan = sparseflax.plan(small, x)
    folded = sparseflax.pack_model(small, plan.all_dense, x, fuse=False)
    networks = {"dense": model, "dense, batch norms folded": folded, "packed": sparseflax.pack_model(small, plan, x)}
    times = in_turn([program(network, x) for network in networks.values()], args.seconds, burst=0.01)
    quartiles = [1e3 * np.quantile(each, (0.25, 0.5, 0.75)) for each in times]
    fastest = min(median for _, median, _ in quartiles[:2])
    print(f"{plan}\n")
    print(f"{'measured':<26} {'median ms':>10} {'quartiles':>16} {'over the faster dense':>22}")
    for name, (low, median, high) in zip(networks, quartiles, strict=True):
        print(f"{name:<26} {median:>10.3f} {f'{low:.3f} to {high:.3f}':>16} {f'{fastest / median:.2f}x':>22}")
    if args.steps or args.svg:
        steps = step_times(networks["packed"], x, plan.machine, show=True)
        print(f"\n{steps}")
        if args.svg:
            write_atomically(args.svg, _picture(args.network, steps))
            print(f"written to {args.svg}")


def _picture(network: str, steps: Any) -> str:
    """The steps that take longest, as SVG."""
    from sparseflax.job.page import pairs

    longest = sorted(steps.steps, key=lambda step: -max(step.predicted, step.measured))[:PICTURED]
    rows = [(step.path or step.op, 1e6 * step.predicted, 1e6 * step.measured) for step in longest]
    title = (f"{Path(network).name}, {steps.images} image{'s' * (steps.images > 1)}, {steps.machine.threads} threads: "
             f"{len(rows)} of {len(steps.steps)} steps")
    return pairs(rows, ("predicted", "measured"), "us", title)


def _faster(args: argparse.Namespace) -> None:
    from sparseflax.job.faster import faster
    from sparseflax.job.report import summary

    options = {name: value for name, value in vars(args).items() if name not in ("command", "network", "images", "threads")}
    print(summary(faster(args.network, args.images, **options)))
    print(f"report: {Path(args.out or f'{Path(args.network).stem}-faster') / 'report.html'}")


def _guide(model: Any, x: Any, speedup: float, machine: Any = None) -> Any:
    """For this machine, whose whole network is timed, or the layers alone for another."""
    import sparseflax
    from sparseflax import prune
    from sparseflax.network.plan import elsewhere

    machine = machine or sparseflax.detect_machine()
    whole = None if elsewhere(machine) else prune.measure(model, x, machine)
    return prune.guided(sparseflax.conv_shapes(model, x), machine, speedup=speedup, whole=whole, best_effort=True)


def read(network: str, batch: int, shape: tuple[int, ...] | None = None) -> tuple[Any, Any]:
    """A model and an input for it, of normal numbers where none is given with it.

    Args:
      network: path of an ONNX file, or "module:function".
      batch: images in the input.
      shape: of one image (h, w, c), or of one input of another kind; None for what the network says.

    Raises:
      ImportError, OSError: the file, module or function is not there.
      TypeError: what the function returns is no model.
      ValueError: the file cannot be read, or leaves the shape open.
    """
    if batch < 1:
        raise ValueError(f"--batch {batch}, wanted at least 1")
    if ":" in network and not Path(network).exists():
        model, x = _called(network)
    else:
        from sparseflax.onnx import load_onnx

        model, x = load_onnx(network), None
        if shape is None and None in model.program.shape:
            raise ValueError(f"{network} takes inputs of shape {model.program.shape}, None where it is open: say --shape H,W,C")
        shape = shape or tuple(size for size in model.program.shape if size is not None)
    if x is None and shape is None:
        raise ValueError(f"{network} says nothing of its input: return (model, x) from it, or say --shape H,W,C")
    if shape is not None:
        return model, np.random.default_rng(0).standard_normal((batch, *shape), np.float32)
    return model, jax.tree.map(lambda array: np.resize(array, (batch, *np.shape(array)[1:])), x)


def _called(network: str) -> tuple[Any, Any]:
    from flax import linen, nnx

    module, _, function = network.partition(":")
    made = getattr(importlib.import_module(module), function, None)
    if made is None:
        raise ImportError(f"the module {module} has no {function!r}")
    made = made()
    if isinstance(made, nnx.Module) or (isinstance(made, tuple) and made and isinstance(made[0], linen.Module)):
        made = made, None
    if not (isinstance(made, tuple) and len(made) == 2):
        raise TypeError(f"{network} returned a {type(made).__name__}, wanted a model or a pair (model, input)")
    return made


def _sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in text.split(","))
    if math.prod(sizes) < 1 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has a size below 1")
    return sizes


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(","))


if __name__ == "__main__":
    main()
