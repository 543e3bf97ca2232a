"""What a job has shown: as plain values, for the terminal, and as an HTML page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np

from sparseflax.job.fidelity import BEST, Fidelity, Outputs
from sparseflax.job.page import bars, curve, page, table
from sparseflax.job.times import Times

MET = 0.05  # a measured speedup this close to the one asked for, relatively, meets it
PACKED = "this network, faster"
SHOWN = 160  # pixels of the worst picture's longer side, at least


def result(job: Any, name: str, wishes: Mapping[str, Any], notes: Sequence[str], chosen: Any, tried: Sequence[Any],
           times: Times, unwritten: str, highest: Any) -> dict[str, Any]:
    """All that is to be told, in plain values.

    Args:
      job: that was done.
      name: of the network.
      wishes: what was asked.
      notes: of the pictures, and of what was measured before.
      chosen: the network that is delivered.
      tried: all that were.
      times: of them, and of others.
      unwritten: why there is no pruned ONNX file, or "".
      highest: guide to the highest speed.
    """
    number = tried.index(chosen)
    dense = times.faster_dense
    worst = int(np.argmax(chosen.fidelity.errors))
    kept = sum(row.density * row.shape.weights for row in chosen.plan.layers if row.shape)
    rows = {path: layer for path, layer in chosen.guide.layers.items()}
    return {
        "network": name, "asked": dict(wishes), "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": str(job.machine), "threads": job.machine.threads, "batch": len(job.x),
        "versions": {package: version(package) for package in ("jax", "flax", "sparseflax")},
        "pictures": {"seen": len(job.seen), "unseen": len(job.unseen), "notes": list(notes)},
        "seconds": {"dense": times.dense, "folded": times.folded, "packed": times.packed[number], **times.engines},
        "coarser": {name: {"seconds": seconds, "error": error} for name, (seconds, error) in times.coarser.items()},
        "failed": times.failed, "speedup": dense / times.packed[number], "shortfall": chosen.guide.shortfall,
        "highest": {"speedup": highest.speedup, "where": highest.shortfall.partition(": ")[2]},
        "weights": sum(row.shape.weights for row in chosen.plan.layers if row.shape), "kept": round(kept),
        "fidelity": _fidelity(chosen.fidelity),
        "worst": {"name": job.unseen.names[worst], "picture": _png(job.unseen.pixels[worst]),
                  "error": float(chosen.fidelity.errors[worst]),
                  "before": _answers(job.said[1], worst), "after": _answers(chosen.said, worst)},
        "errors": [float(q) for q in np.quantile(chosen.fidelity.errors, (0, 0.25, 0.5, 0.75, 0.95, 1))],
        "curve": [{"asked": one.speedup, "speedup": dense / seconds, "seconds": seconds, **_fidelity(one.fidelity),
                   "chosen": one is chosen} for one, seconds in zip(tried, times.packed, strict=True)],
        "layers": [{"path": row.path, "shape": str(row.shape or "x".join(map(str, row.kernel_shape))), "density": row.density,
                    "choice": row.choice, "int8": row.inputs is not None, "dense": row.dense_seconds,
                    "sparse": row.sparse_seconds, "reason": row.reason,
                    "guide": rows[row.path].reason if row.path in rows else ""} for row in chosen.plan.layers],
        "pruned_onnx": unwritten or "pruned.onnx",
    }


def headline(result: Mapping[str, Any]) -> str:
    """What came out, in a sentence or three."""
    asked, fidelity = result["asked"], result["fidelity"]
    wish = " and ".join([*([f"{asked['speedup']:g}x"] if asked["speedup"] else []),
                         *([f"{asked['milliseconds']:g} ms"] if asked["milliseconds"] else []),
                         *([f"at most {asked['points']:g} points lost"] if asked["points"] else [])])
    before, now = _ms(min(result["seconds"]["dense"], result["seconds"]["folded"])), _ms(result["seconds"]["packed"])
    kept, lost = 100 * result["kept"] / result["weights"], _lost(fidelity)
    rounded = sum(row["int8"] for row in result["layers"])
    bits = f" and {rounded} of its {len(result['layers'])} layers in eight bits" if rounded else ""
    text = (f"Asked for {wish}: {result['network']} now takes {now} where it took {before}, {result['speedup']:.2f} times as "
            f"fast, with {kept:.0f} % of its weights{bits}. {lost[0].upper()}{lost[1:]} on {result['pictures']['unseen']} "
            "pictures it was not pruned by.")
    if asked["points"] and fidelity["points"] + fidelity["doubt"] > asked["points"]:
        text += (f" No network that was tried is sure to keep to {asked['points']:g} points{_doubted(fidelity)}: this is "
                 "the one that loses least.")
    elif asked["speedup"] and result["speedup"] < asked["speedup"] * (1 - MET):
        why = "more would cost more than the points allow" if asked["points"] and len(result["curve"]) > 1 else \
            result["shortfall"] or "the measured network is slower than predicted"
        text += f" That is less than asked: {why}."
    return text


def summary(result: Mapping[str, Any]) -> str:
    """A few lines for the terminal."""
    rows = [(label, text) for label, _, text in _speeds(result)]
    width = max(len(label) for label, _ in rows)
    lines = [f"{label.ljust(width)}  {text}" for label, text in rows]
    if len(result["curve"]) > 1:
        lines += ["", "what can be had for what:", *_columns([_CURVE, *_curve_rows(result)]), _bound(result)]
    return "\n".join([*lines, "", headline(result)])


def render(result: Mapping[str, Any]) -> str:
    """One self-contained HTML page."""
    fidelity, worst, asked = result["fidelity"], result["worst"], result["asked"]
    rows = _speeds(result)
    parts = ["<h2>Time of a call</h2>", bars(rows, [PACKED]),
             _note(f"Batch {result['batch']}, {result['threads']} threads, on {result['machine']}. Medians of calls of "
                   f"whole networks, in turn, in float32 where nothing else is said{_rounded(result)}; the dense network as "
                   "JAX runs it jitted, as it is and with norms folded. What an engine is off by is the largest error of an "
                   "output over the largest output. " +
                   " ".join(f"{name} was left out: {why}." for name, why in result["failed"].items())),
             "<h2>What it costs</h2>", table(("", ""), _fidelity_rows(result))]
    if len(result["curve"]) > 1:
        points = [(one["speedup"], one["points"]) for one in result["curve"]]
        chosen = next((one["speedup"], one["points"]) for one in result["curve"] if one["chosen"])
        parts += ["<h2>What can be had for what</h2>",
                  curve(points, chosen, "times as fast, measured", f"points of {fidelity['measure']} lost", asked["points"]),
                  table(_CURVE, _curve_rows(result)),
                  _note("Each was pruned, packed and timed. Filled: the network in this folder. " + _bound(result))]
    parts += ["<h2>The worst picture</h2>",
              f"<p><img alt='{html.escape(worst['name'], quote=True)}' src='data:image/png;base64,{worst['picture']}' "
              f"style='image-rendering: pixelated; min-width: {SHOWN}px; border: 1px solid #ccc'></p>",
              f"<p>{html.escape(worst['name'])}: relative error {worst['error']:.3g}.</p>"]
    if worst["before"]:
        parts.append(table(("before", "", "after", ""), [(*_answer(a), *_answer(b)) for a, b in
                                                         zip(worst["before"], worst["after"], strict=True)]))
    parts += ["<h2>Layer by layer</h2>",
              table(("layer", "shape", "density", "runs", "dense us", "sparse us", "how far it was pruned", "how it runs"),
                    [(row["path"], row["shape"], f"{row['density']:.3f}", row["choice"] + " int8" * row["int8"],
                      _us(row["dense"]), _us(row["sparse"]), row["guide"], row["reason"]) for row in result["layers"]]),
              _note("Microseconds as predicted by the performance model, in float32. Layers were pruned by optimal brain "
                    "surgery on what they see of the pictures, then the outputs of each were given their mean and spread "
                    "back."),
              "<h2>The pictures</h2>", "<ul>",
              *(f"<li>{html.escape(note)}</li>" for note in result["pictures"]["notes"]),
              "</ul>",
              "<h2>What is in this folder</h2>", "<pre>" + html.escape(_USE.format(network=result["network"])) + "</pre>",
              _note("pruned.onnx is the file with its weights replaced, in float32, for engines that read ONNX: none of those "
                    "above uses zeros, so none becomes faster by it." if result["pruned_onnx"] == "pruned.onnx" else
                    f"There is no pruned.onnx: {result['pruned_onnx']}."),
              _note(", ".join(f"{name} {text}" for name, text in result["versions"].items()) + f", {result['date']}.")]
    return page(f"{result['network']}, faster", headline(result), "\n".join(parts))


_CURVE = ("asked", "measured", "ms", "points lost", "relative error", "")
_USE = """import jax, sparseflax
from sparseflax.onnx import load_onnx

model, plan = sparseflax.load("network.safetensors", load_onnx("{network}"))
y = jax.jit(lambda model, x: model(x))(model, x)                # x (n, h, w, c), scaled as above"""


def engine_name(key: str) -> str:
    """ "OpenVINO, bf16" of "openvino bf16"."""
    name, _, precision = key.partition(" ")
    return {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}[name] + (f", {precision}" if precision else "")


def _rounded(result: Mapping[str, Any]) -> str:
    return ", this one's layers in eight bits apart" if any(row["int8"] for row in result["layers"]) else ""


def _speeds(result: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """(who, seconds, in words) of all that were timed, the slowest first."""
    seconds = result["seconds"]
    names = {"dense": "dense, JAX", "folded": "dense, JAX, norms folded", "packed": PACKED}
    rows = [(names.get(key) or f"dense, {engine_name(key)}", value,
             f"{_ms(value)}" + ("" if key == "packed" else f"  {value / seconds['packed']:.2f}x of it"))
            for key, value in seconds.items()]
    rows += [(f"dense, {engine_name(key)}", one["seconds"],
              f"{_ms(one['seconds'])}  {one['seconds'] / seconds['packed']:.2f}x of it, off by {100 * one['error']:.2g} %")
             for key, one in result.get("coarser", {}).items()]
    return sorted(rows, key=lambda row: -row[1])


def _fidelity_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    fidelity, quantiles = result["fidelity"], result["errors"]
    rows = [("weights kept", f"{result['kept']:,} of {result['weights']:,}")]
    if fidelity["score"] is not None:
        rows.append(("score, before and after", f"{fidelity['original_score']:.2f} %, {fidelity['score']:.2f} %"))
    if fidelity["accuracy"] is not None:
        before, after = fidelity["original_accuracy"], fidelity["accuracy"]
        rows.append(("accuracy, before and after", f"{100 * before:.2f} %, {100 * after:.2f} %"))
    if fidelity["agreement"] is not None:
        rows.append(("same top answer", f"{100 * fidelity['agreement']:.2f} %"))
    return [*rows, ("relative error of the outputs", f"{fidelity['error']:.3g}"),
            ("of one picture: median, 95 %, worst", ", ".join(f"{quantiles[i]:.3g}" for i in (2, 4, 5))),
            ("compared on", f"{result['pictures']['unseen']} pictures that it was not pruned by; "
                            f"{result['pictures']['seen']} were used for that")]


def _curve_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [(f"{one['asked']:.2f}x", f"{one['speedup']:.2f}x", f"{1e3 * one['seconds']:.3g}",
             f"{one['points']:.2f}{_doubted(one)}", f"{one['error']:.3g}", "<- written" if one["chosen"] else "")
            for one in result["curve"]]


def _doubted(fidelity: Mapping[str, Any]) -> str:
    return f" ± {fidelity['doubt']:.2f}" if fidelity["doubt"] else ""


def _bound(result: Mapping[str, Any]) -> str:
    highest = result["highest"]
    return (f"The most that the performance model grants here, whatever it costs, is {highest['speedup']:.2f}x" +
            (f": then {highest['where']}." if highest["where"] else "."))


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _lost(fidelity: Mapping[str, Any]) -> str:
    if fidelity["score"] is not None:
        return f"its score went from {fidelity['original_score']:.2f} % to {fidelity['score']:.2f} %"
    if fidelity["accuracy"] is not None:
        return (f"its accuracy went from {100 * fidelity['original_accuracy']:.2f} % to {100 * fidelity['accuracy']:.2f} %, "
                f"and its top answer is the original's in {100 * fidelity['agreement']:.2f} % of the cases,")
    if fidelity["agreement"] is not None:
        return f"its top answer is the original's in {100 * fidelity['agreement']:.2f} % of the cases"
    return f"its outputs are {100 * fidelity['error']:.2g} % off"


def _fidelity(fidelity: Fidelity) -> dict[str, Any]:
    numbers = {name: value for name, value in fidelity._asdict().items() if name != "errors"}
    return numbers | {"points": fidelity.points, "measure": fidelity.measure}


def _answers(said: Outputs, picture: int) -> list[list[float]] | None:
    """[class, output] of a classifier's best answers to a picture, None of another network's."""
    answers = said.answers
    if answers is None or answers.ndim > 1:
        return None
    y = said.arrays[0][picture]
    return [[int(i), float(y[i])] for i in np.argsort(-y)[:BEST]]


def _answer(answer: Sequence[float]) -> tuple[str, str]:
    return f"class {answer[0]:.0f}", f"{answer[1]:.3g}"


def _png(pixels: np.ndarray) -> str:
    from PIL import Image

    text = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(text, "PNG")
    return base64.b64encode(text.getvalue()).decode()


def _note(text: str) -> str:
    return f"<p class=note>{html.escape(text.strip())}</p>"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _us(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e6 * seconds:.0f}"
