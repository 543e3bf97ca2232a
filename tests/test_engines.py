"""Other engines that run a user's ONNX file: in float32, in eight bits, and why one does not."""

import importlib.util

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparseflax.job.engines import engines

pytest.importorskip("onnxruntime")

X = np.random.default_rng(0).random((2, 3, 8, 8), np.float32)
KERNEL = np.random.default_rng(1).standard_normal((16, 3, 3, 3), np.float32) * np.geomspace(0.3, 3, 16)[:, None, None, None]


def network(opset, operator="Relu"):
    """A convolution, and a mean."""
    nodes = [helper.make_node("Conv", ["picture", "w"], ["c"], pads=[1] * 4), helper.make_node(operator, ["c"], ["r"]),
             helper.make_node("GlobalAveragePool", ["r"], ["y"])]
    inputs, outputs = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)]
                       for name, shape in (("picture", ["n", 3, 8, 8]), ("y", ["n", 16, 1, 1])))
    graph = helper.make_graph(nodes, "graph", inputs, outputs, [numpy_helper.from_array(KERNEL.astype(np.float32), "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8).SerializeToString()


@pytest.mark.parametrize("opset", [11, 17])  # scales by channel came with 13
def test_in_eight_bits(opset):
    ready, failed = engines(network(opset), X, 1, np.concatenate([X, X[:1]]))
    right = ready["onnxruntime"].outputs()[0]
    names = {"onnxruntime", "onnxruntime int8"}
    if importlib.util.find_spec("openvino") is not None:
        names |= {"openvino", "openvino int8"}
    assert not failed and names <= ready.keys()
    for name, engine in ready.items():
        engine.run()
        assert engine.exact == (name in ("onnxruntime", "openvino"))
        off = np.abs(engine.outputs()[0] - right).max(axis=(0, 2, 3))
        # Rounded by half a step at most: 27 inputs of [0, 1], weights by the largest of their channel, what the convolution has
        # and its mean by the largest of all, at most the sum of a channel's weights. bfloat16 has eight bits, too.
        sums, largest = np.abs(KERNEL).sum(axis=(1, 2, 3)), np.abs(KERNEL).max(axis=(1, 2, 3))
        assert np.all(off <= (1e-5 * sums if engine.exact else sums / 510 + 27 * largest / 254 + 2 * sums.max() / 510))


def test_eight_bits_are_not_asked_for():
    ready, failed = engines(network(17), X, 1)
    assert not failed and "onnxruntime" in ready and not any("int8" in name for name in ready)


def test_why_not():
    ready, failed = engines(network(17, "Nonsense"), X, 1, X)
    assert not ready and failed.keys() >= {"onnxruntime", "onnxruntime int8"}
    assert all(len(why) < 400 and "\n" not in why and "Nonsense" in why for why in failed.values())
