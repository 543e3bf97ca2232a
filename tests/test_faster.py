"""`faster`, from an ONNX file and a folder of pictures to a report, as small as it can be, and what it says to mistakes."""


import numpy as np
import pytest

import sparseflax
from sparseflax.job import faster as job
from sparseflax.onnx import load_onnx
from sparseflax.prune.whole import Whole
from tests.machines import HERE

onnx = pytest.importorskip("onnx")
pillow = pytest.importorskip("PIL.Image")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

CHANNELS, CLASSES, SIDE, COUNT = (3, 32, 48), 5, 12, 64


def write_network(path, *, shape=(1, 3, SIDE, SIDE), convolutions=True):
    """Two convolutions, the first with its batch norm, and a classifier; or the classifier alone."""
    draw = np.random.default_rng(0)
    weights, nodes, at = {}, [], "x"
    for i, (ic, oc) in enumerate(zip(CHANNELS, CHANNELS[1:], strict=False)) if convolutions else ():
        weights[f"w{i}"] = draw.standard_normal((oc, ic, 3, 3)) * (2 / (9 * ic)) ** 0.5
        weights[f"b{i}"] = draw.standard_normal(oc) / 9
        nodes += [helper.make_node("Conv", [at, f"w{i}", *([f"b{i}"] if i else [])], [f"c{i}"], pads=[1] * 4, name=f"conv{i}")]
        if i == 0:
            weights |= {"scale": np.ones(oc), "mean": np.full(oc, 0.1), "var": np.full(oc, 1.5)}
            nodes += [helper.make_node("BatchNormalization", ["c0", "scale", "b0", "mean", "var"], ["n0"], name="norm")]
        nodes += [helper.make_node("Relu", ["n0" if i == 0 else f"c{i}"], [f"r{i}"])]
        at = f"r{i}"
    last = CHANNELS[-1] if convolutions else 3
    weights |= {"w": draw.standard_normal((CLASSES, last)), "b": draw.standard_normal(CLASSES)}
    nodes += [helper.make_node("GlobalAveragePool", [at], ["pooled"]), helper.make_node("Flatten", ["pooled"], ["flat"]),
              helper.make_node("Gemm", ["flat", "w", "b"], ["y"], transB=1, name="head")]
    graph = helper.make_graph(nodes, "graph", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
                              [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in weights.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, path)
    return path


def write_pictures(folder, count=COUNT, side=SIDE):
    """Blobs of colour."""
    folder.mkdir()
    draw = np.random.default_rng(1)
    for i in range(count):
        coarse = draw.integers(0, 256, (3, 3, 3), np.uint8)
        pillow.fromarray(coarse).resize((side, side)).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module", autouse=True)
def known():
    """Known constants instead of a measurement: what is pruned must not depend on how busy this machine is."""
    with pytest.MonkeyPatch.context() as patch:
        def predicted(model, x, machine, *, seconds):
            plan = sparseflax.plan(model, x, machine)
            return Whole(plan.dense_seconds, dense_scale=1.0)

        patch.setattr(job, "machine_of", lambda folder: HERE)
        patch.setattr(job, "measure", predicted)
        yield


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    network, pictures = write_network(folder / "network.onnx"), write_pictures(folder / "pictures")
    return network, pictures


@pytest.fixture(scope="module")
def finished(given, tmp_path_factory):
    out = tmp_path_factory.mktemp("job") / "out"
    return out, sparseflax.faster(*given, speedup=2, out=out, seconds=0.1)


def test_what_is_written_computes_the_same(given, finished):
    network, _ = given
    out, result = finished
    packed, plan = sparseflax.load(out / "network.safetensors", load_onnx(network))
    assert [row.path for row in plan.layers if row.choice == "sparse"]
    pruned = load_onnx(out / "pruned.onnx")
    x = np.random.default_rng(2).random((2, SIDE, SIDE, 3), np.float32)
    y = pruned(x)
    np.testing.assert_allclose(packed(x), y, rtol=0, atol=1e-4 * np.abs(y).max())
    assert {row.path: row.density for row in sparseflax.plan(pruned, x, HERE).layers} == {
        row.path: row.density for row in plan.layers}
    assert result["kept"] < result["weights"]
