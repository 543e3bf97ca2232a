"""ONNX networks: every operator against ONNX Runtime, layouts, folding and packing, and what is refused."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparseflax
from experiments import foreign
from experiments.export_onnx import to_onnx
from experiments.networks import Spec, pruned
from sparseflax.onnx import load_onnx
from sparseflax.onnx.older import QUANTIZED
from sparseflax.onnx.ops import OPERATORS as OPERATORS_READ
from tests.machines import HERE
from tests.networks import NARROW

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

IMAGE = (2, 6, 9, 8)
U = 2.0**-24


def random(*shape, seed=0):
    return np.asarray(np.random.default_rng(seed).standard_normal(shape), np.float32)


def node(op, inputs, outputs, **attributes):
    return helper.make_node(op, inputs.split(), outputs.split(), name=f"the_{outputs.split()[0]}", **attributes)


def save(path, nodes, constants=(), shape=IMAGE, outputs=("y",), opset=17, sparse=()):
    """A model x -> outputs in a file."""
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in dict(constants).items()]
    graph = helper.make_graph(
        list(nodes), "graph", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs], tensors,
        sparse_initializer=list(sparse))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 8
    onnx.save(model, path)
    return path


def expected(path, x):
    """ONNX Runtime's outputs, without its fusions."""
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})


run = jax.jit(lambda model, x: model(x))  # one for all: what was compiled for a model is found again


def nhwc(x):
    return x.transpose(0, 2, 3, 1) if x.ndim == 4 else x


def agree(path, x, terms, scale=1.0, model=None):
    """Asserts that our outputs are ONNX Runtime's.

    Both err by less than 8 sqrt(terms) u times the largest sum of magnitudes, `scale` (Higham and Mary 2019), which is
    taken as a multiple of the largest output.
    """
    model = model or load_onnx(path)
    ours = run(model, nhwc(x))
    theirs = expected(path, x)
    for mine, right in zip(ours if isinstance(ours, tuple) else (ours,), theirs, strict=True):
        right = nhwc(right)
        assert mine.shape == right.shape
        assert np.abs(right).max() > 0
        np.testing.assert_allclose(mine, right, rtol=0, atol=2 * 8 * terms**0.5 * U * scale * np.abs(right).max())
    return model


W3 = {"w": random(10, 6, 3, 3), "b": random(10, seed=1)}
OPERATORS = {
    "conv": ([node("Conv", "x w b", "y", pads=[1, 2, 0, 1], strides=[2, 1])], W3),
    "conv, no bias": ([node("Conv", "x w", "y", dilations=[2, 3])], {"w": W3["w"]}),
    "conv, groups": ([node("Conv", "x w b", "y", group=2, pads=[1, 1, 1, 1])], {"w": random(10, 3, 3, 3), "b": W3["b"]}),
    "conv, depthwise": ([node("Conv", "x w", "y", group=6)], {"w": random(12, 1, 2, 3)}),
    "conv, same upper": ([node("Conv", "x w b", "y", auto_pad="SAME_UPPER", strides=[2, 2])], W3),
    "conv, same lower": ([node("Conv", "x w b", "y", auto_pad="SAME_LOWER", strides=[2, 2])], W3),
    "conv, valid": ([node("Conv", "x w b", "y", auto_pad="VALID")], W3),
    "conv, added bias": ([node("Conv", "x w", "c"), node("Add", "b c", "y")], {"w": W3["w"], "b": random(10, 1, 1)}),
    "batch norm": ([node("BatchNormalization", "x s b m v", "y", epsilon=1e-3)],
                   {"s": random(6), "b": random(6, seed=1), "m": random(6, seed=2), "v": np.abs(random(6, seed=3))}),
    "relu": ([node("Relu", "x", "y")], {}),
    "clip to 6": ([node("Clip", "x low high", "y")], {"low": np.float32(0), "high": np.float32(6)}),
    "clip from below": ([node("Clip", "x low", "y")], {"low": np.float32(-0.5)}),
    "add": ([node("Relu", "x", "r"), node("Add", "x r", "y")], {}),
    "add, repeated": ([node("GlobalAveragePool", "x", "g"), node("Add", "g x", "y")], {}),
    "max pool": ([node("MaxPool", "x", "y", kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 0, 1])], {}),
    "max pool, ceil": ([node("MaxPool", "x", "y", kernel_shape=[2, 3], strides=[2, 2], ceil_mode=1)], {}),
    "max pool, ceil and pads": (
        [node("MaxPool", "x", "y", kernel_shape=[2, 2], strides=[3, 3], pads=[1] * 4, ceil_mode=1)], {}),
    "max pool, dilated": ([node("MaxPool", "x", "y", kernel_shape=[3, 3], dilations=[2, 3])], {}),
    "max pool, same": ([node("MaxPool", "x", "y", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_LOWER")], {}),
    "average pool": ([node("AveragePool", "x", "y", kernel_shape=[3, 2], strides=[2, 2])], {}),
    "average pool, pads": ([node("AveragePool", "x", "y", kernel_shape=[3, 3], pads=[1, 2, 0, 1])], {}),
    "average pool, pads counted": ([node("AveragePool", "x", "y", kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1)], {}),
    "average pool, ceil": ([node("AveragePool", "x", "y", kernel_shape=[2, 3], strides=[2, 2], ceil_mode=1)], {}),
    "global average pool": ([node("GlobalAveragePool", "x", "y")], {}),
    "concat": ([node("Relu", "x", "r"), node("Concat", "x r x", "y", axis=1)], {}),
    "concat, rows": ([node("Relu", "x", "r"), node("Concat", "x r", "y", axis=-2)], {}),
    "flatten": ([node("Flatten", "x", "y")], {}),
    "reshape": ([node("Reshape", "x s", "y")], {"s": np.array([0, -1])}),
    "reshape, sized": ([node("Reshape", "x s", "y")], {"s": np.array([-1, 6 * 9 * 8])}),
    "sizes computed": (
        [node("Relu", "x", "r"), node("Shape", "r", "s"), node("Gather", "s zero", "n"), node("Unsqueeze", "n axis", "l"),
         node("Concat", "l rest", "c", axis=0), node("Reshape", "r c", "f"), node("Gemm", "f w", "y")],
        {"zero": np.array(0), "axis": np.array([0]), "rest": np.array([-1]), "w": random(432, 10)}),
    "sizes sliced": (
        [node("Shape", "x", "s"), node("Slice", "s zero one", "l"), node("Cast", "rest", "i", to=TensorProto.INT64),
         node("Concat", "l i", "c", axis=0), node("Reshape", "x c", "y")],
        {"zero": np.array([0]), "one": np.array([1]), "rest": np.array([-1], np.int32)}),
    "mean of pixels": ([node("ReduceMean", "x", "y", axes=[2, 3])], {}),
    "mean of pixels, channels left": ([node("ReduceMean", "x", "m", axes=[-1, -2], keepdims=0), node("Gemm", "m w", "y")],
                                      {"w": random(6, 10)}),
    "squeeze": ([node("GlobalAveragePool", "x", "g"), node("Squeeze", "g axes", "y")], {"axes": np.array([2, 3])}),
    "mul": ([node("Sigmoid", "x", "s"), node("Mul", "x s", "y")], {}),
    "mul, repeated": ([node("GlobalAveragePool", "x", "g"), node("HardSigmoid", "g", "s"), node("Mul", "s x", "y")], {}),
    "hard sigmoid": ([node("HardSigmoid", "x", "y", alpha=0.5, beta=0.25)], {}),
    "hard swish": ([node("HardSwish", "x", "y")], {}),
    "leaky relu": ([node("LeakyRelu", "x", "y", alpha=0.1)], {}),
    "leaky relu, default": ([node("LeakyRelu", "x", "y")], {}),
    "tanh": ([node("Tanh", "x", "y")], {}),
    "softmax": ([node("Softmax", "x", "y", axis=1)], {}),
    "softmax, last": ([node("Softmax", "x", "y")], {}),
    "lrn": ([node("LRN", "x", "y", size=5, alpha=0.3, beta=0.75, bias=2.0)], {}),
    "lrn with another exponent": ([node("LRN", "x", "y", size=3, alpha=0.3, beta=0.6, bias=2.0)], {}),
    "dropout and identity": ([node("Dropout", "x", "d"), node("Identity", "d", "i"), node("Relu", "i", "y")], {}),
    "constant": ([helper.make_node("Constant", [], ["low"], value_float=0.25), node("Clip", "x low", "y")], {}),
    "gemm": ([node("Flatten", "x", "f"), node("Gemm", "f w b", "y", alpha=0.5, beta=2.0)],
             {"w": random(432, 10), "b": random(1, 10)}),
    "gemm, computed bias": ([node("Flatten", "x", "f"), node("MatMul", "f v", "b"), node("Gemm", "f w b", "y")],
                            {"w": random(432, 10), "v": random(432, 10, seed=1)}),
    "gemm, bias of rows": ([node("Flatten", "x", "f"), node("Gemm", "f w b", "y")], {"w": random(432, 10), "b": random(2, 10)}),
    "gemm, transposed": ([node("Flatten", "x", "f"), node("Gemm", "f w", "y", transB=1)], {"w": random(10, 432)}),
    "gemm after relu": ([node("Flatten", "x", "f"), node("Relu", "f", "r"), node("Gemm", "r w", "y")], {"w": random(432, 10)}),
    "matmul and bias": ([node("Reshape", "x s", "f"), node("MatMul", "f w", "m"), node("Add", "m b", "y")],
                        {"s": np.array([2, -1]), "w": random(432, 10), "b": random(10)}),
    "two users of a flattened image": (
        [node("Flatten", "x", "f"), node("Gemm", "f w", "g"), node("Concat", "f g", "y", axis=1)], {"w": random(432, 10)}),
    "conv, half precision": ([node("Cast", "w", "f", to=TensorProto.FLOAT), node("Conv", "x f", "y")],
                             {"w": random(10, 6, 3, 3).astype(np.float16)}),
    "conv, computed kernel": ([node("Conv", "x w", "k"), node("ReduceSum", "k axes", "s", keepdims=0), node("Mul", "s v", "m"),
                               node("Conv", "x m b", "y", pads=[1, 1, 1, 1], strides=[2, 1])],
                              {"w": random(1, 6, 9, 8), "axes": np.array([0, 1, 2, 3]), "v": W3["w"], "b": W3["b"]}),
    "conv, one dimension": ([node("Reshape", "x s", "r"), node("Conv", "r w b", "y", pads=[2, 1], strides=[2], dilations=[2])],
                            {"s": np.array([0, 0, -1]), "w": random(10, 6, 3), "b": W3["b"]}),
    "conv, three dimensions": ([node("Unsqueeze", "x axes", "r"), node("Conv", "r w", "y", pads=[0, 1, 1, 0, 1, 0])],
                               {"axes": np.array([1]), "w": random(3, 1, 2, 3, 3)}),
    "conv transposed": ([node("ConvTranspose", "x w b", "y", strides=[2, 3], pads=[1, 0, 2, 1], output_padding=[1, 2])],
                        {"w": random(6, 10, 3, 4), "b": W3["b"]}),
    "conv transposed, dilated": ([node("ConvTranspose", "x w", "y", dilations=[2, 1])], {"w": random(6, 4, 3, 2)}),
    "conv transposed, groups": ([node("ConvTranspose", "x w b", "y", group=2, strides=[2, 2])],
                                {"w": random(6, 5, 3, 3), "b": W3["b"]}),
    "conv transposed, same": ([node("ConvTranspose", "x w", "y", auto_pad="SAME_UPPER", strides=[2, 2])],
                              {"w": random(6, 4, 3, 3)}),
    "flatten, later": ([node("Flatten", "x", "y", axis=2)], {}),
    "reshape to three": ([node("Reshape", "x s", "y")], {"s": np.array([0, 6, -1])}),
    "channels shuffled": ([node("Conv", "x w", "c"), node("Reshape", "c s", "r"),
                           node("Transpose", "r", "t", perm=[0, 2, 1, 3, 4]), node("Reshape", "t u", "y")],
                          {"w": W3["w"], "s": np.array([0, 5, 2, 7, 6]), "u": np.array([0, 10, 7, 6])}),
    "pixels as tokens": ([node("Conv", "x w", "c"), node("Reshape", "c s", "r"), node("Transpose", "r", "t", perm=[0, 2, 1]),
                          node("MatMul", "t m", "u"), node("Transpose", "u", "v", perm=[0, 2, 1]), node("Reshape", "v e", "y")],
                         {"w": W3["w"], "s": np.array([0, 10, -1]), "m": random(10, 4), "e": np.array([0, 4, 7, 6])}),
    "mean of channels": ([node("ReduceMean", "x", "y", axes=[1])], {}),
    "mean of all": ([node("ReduceMean", "x", "y")], {}),
    "matmul of columns": ([node("MatMul", "x w", "y")], {"w": random(8, 2)}),
    "matmul from the left": ([node("MatMul", "w x", "y")], {"w": random(5, 9)}),
    "constant operands": ([node("Sub", "v x", "s"), node("Mul", "s w", "m"), node("Div", "m x", "y")],
                          {"w": random(6, 1, 1), "v": random(9, 8)}),
    "sines": ([node("Sin", "x", "s"), node("Erf", "s", "y")], {}),
    "gemm, transposed input": ([node("Flatten", "x", "f"), node("Gemm", "f w", "y", transA=1)], {"w": random(2, 2)}),
    "group norm spelled out": (
        [node("Reshape", "x s", "r"), node("InstanceNormalization", "r one zero", "i"), node("Shape", "x", "h"),
         node("Reshape", "i h", "b"), node("Mul", "b w", "y")],
        {"s": np.array([0, 3, -1]), "one": np.ones(3, np.float32), "zero": np.zeros(3, np.float32), "w": random(6, 1, 1)}),
    "upsampled to computed sizes": (
        [node("Shape", "x", "h"), node("Slice", "h two four", "i"), node("Mul", "i factor", "j"),
         node("Slice", "h zero two", "k"),
         node("Concat", "k j", "sizes", axis=0),
         helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], name="the_y", mode="linear")],
        {"zero": np.array([0]), "two": np.array([2]), "four": np.array([4]), "factor": np.array([2, 3])}),
    "recurrent": ([node("Reshape", "x s", "r"), node("LSTM", "r w u b", "l", hidden_size=5, direction="bidirectional"),
                   node("Squeeze", "l last", "q"), node("Relu", "q", "y")],
                  {"s": np.array([9, 1, -1]), "w": random(2, 20, 96), "u": random(2, 20, 5), "b": random(2, 40),
                   "last": np.array([2])}),
    "unsorted": ([node("Relu", "c", "y"), node("Conv", "x w b", "c")], W3),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_agree_with_onnx_runtime(name, tmp_path):
    nodes, constants = OPERATORS[name]
    if name == "unsorted":  # which ONNX Runtime refuses
        sorted_path = save(tmp_path / "sorted.onnx", nodes[::-1], constants)
        agree(sorted_path, random(*IMAGE), 432, model=load_onnx(save(tmp_path / "m.onnx", nodes, constants)))
        return
    # A product of 432 terms at most; a norm or an LRN is a few of them, of terms up to 4 times the result.
    agree(save(tmp_path / "m.onnx", nodes, constants), random(*IMAGE), 432, scale=4.0)


def test_softmax_before_operator_set_13_is_joint(tmp_path):
    for axis in (1, 2):
        agree(save(tmp_path / "m.onnx", [node("Softmax", "x", "y", axis=axis)], opset=11), random(*IMAGE), 432)


def test_old_clip_has_attributes(tmp_path):
    agree(save(tmp_path / "m.onnx", [node("Clip", "x", "y", min=-0.5, max=0.5)], opset=9), random(*IMAGE), 1)


def test_several_outputs_and_an_open_batch(tmp_path):
    path = save(tmp_path / "m.onnx", [node("Relu", "x", "y"), node("Flatten", "y", "z")], shape=("n", 6, 9, 8),
                outputs=("y", "z"))
    agree(path, random(3, 6, 9, 8), 1)


def test_open_sizes(tmp_path):
    path = save(tmp_path / "m.onnx", [node("Conv", "x w b", "c"), node("Flatten", "c", "f"), node("Gemm", "f v", "y")],
                W3 | {"v": random(10 * 7 * 6, 3)}, shape=("n", 6, "h", "w"))
    agree(path, random(*IMAGE), 10 * 42 * 54, scale=4.0)


def test_several_inputs_and_images_that_are_nhwc_already(tmp_path):
    nodes = [node("Transpose", "x", "t", perm=[0, 3, 1, 2]), node("Conv", "t w", "c"), node("Add", "c z", "d"),
             node("Transpose", "d", "y", perm=[0, 2, 3, 1]), node("Relu", "d", "r")]
    path = save(tmp_path / "m.onnx", nodes, {"w": random(10, 6, 3, 3)}, shape=(2, 9, 8, 6), outputs=("y", "r"))
    file = onnx.load(path)
    file.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, (2, 10, 7, 6)))
    onnx.save(file, path)
    x, z = random(2, 9, 8, 6), random(2, 10, 7, 6)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    y, r = session.run(None, {"x": x, "z": z})
    model = load_onnx(path)
    ours = model(x, nhwc(z))
    np.testing.assert_allclose(ours[0], y, rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours[1], nhwc(r), rtol=0, atol=1e-4)
    assert "transpose" not in str(jax.make_jaxpr(lambda model, x, z: model(x, z))(model, x, nhwc(z)))
    with pytest.raises(ValueError, match="1 inputs, wanted 2: x, z"):
        model(x)


@pytest.mark.parametrize("shapes, groups, whole", [
    (((0, 2, -1), (0, 6, 9, 8)), 2, True), (((0, 3, -1), (-1, 6, 9, 8)), 3, True), (((0, 2, -1), (0, 6, 8, 9)), 2, False),
    (((0, 4, -1), (0, 6, 9, 8)), 4, False), (((0, 2, 3, -1), (0, 6, 9, 8)), 2, False)])
def test_group_normalization_of_pytorch(shapes, groups, whole, tmp_path):
    """Groups of channels are normalized where they lie; where the reshapes say something else, that is done."""
    nodes = [node("Conv", "x w", "a", pads=[1, 1, 1, 1]), node("Reshape", "a first", "b"),
             node("InstanceNormalization", "b scale bias", "c", epsilon=1e-3), node("Reshape", "c second", "y")]
    first, second = (np.asarray(shape, np.int64) for shape in shapes)
    path = save(tmp_path / "network.onnx", nodes, {"w": random(6, 6, 3, 3), "first": first, "second": second,
                                                   "scale": random(groups, seed=1), "bias": random(groups, seed=2)})
    x = random(*IMAGE)
    model = agree(path, x, 3 * 72 + 54, scale=8.0)
    assert ("transpose" not in str(jax.make_jaxpr(lambda x: model(x))(nhwc(x)))) == whole


def test_no_transpose_is_left_between_images(tmp_path):
    for name in ("conv", "add, repeated", "concat", "mul, repeated", "upsampled to computed sizes", "conv transposed",
                 "max pool", "batch norm", "two users of a flattened image"):
        model = load_onnx(save(tmp_path / "m.onnx", *OPERATORS[name]))
        equations = str(jax.make_jaxpr(lambda model, x: model(x))(model, jnp.asarray(nhwc(random(*IMAGE)))))
        assert equations.count("transpose[") == (name == "two users of a flattened image"), name


def test_operator_set_6(tmp_path):
    nodes = [node("Add", "x b", "a", broadcast=1, axis=1), node("PRelu", "a s", "p"),
             node("Mul", "p c", "y", broadcast=1, axis=2)]
    constants = {"b": random(6), "s": random(6, seed=1), "c": random(9)}
    y = load_onnx(save(tmp_path / "m.onnx", nodes, constants, opset=6))(nhwc(random(*IMAGE)))
    a = random(*IMAGE) + constants["b"][:, None, None]
    right = np.where(a < 0, constants["s"][:, None, None] * a, a) * constants["c"][:, None]
    np.testing.assert_allclose(y, nhwc(right), rtol=1e-6)


def test_quantized_layers(tmp_path):
    """Rounded as ONNX Runtime rounds; one number may fall to the other side of a tie."""
    scale, zero = {"xs": np.float32(0.05), "ys": np.float32(0.5)}, {"xz": np.uint8(120), "yz": np.uint8(130)}
    kernel = {"w": np.random.default_rng(1).integers(-60, 60, (10, 6, 3, 3)).astype(np.int8), "wz": np.zeros(10, np.int8),
              "ws": np.linspace(0.01, 0.02, 10).astype(np.float32), "b": np.arange(10, dtype=np.int32) * 100}
    quantize, back = node("QuantizeLinear", "x xs xz", "q"), node("DequantizeLinear", "c ys yz", "y")
    one = [quantize, node("QLinearConv", "q xs xz w ws wz ys yz b", "c", pads=[1] * 4), back]
    two = [quantize, node("DequantizeLinear", "q xs xz", "d"), node("DequantizeLinear", "w ws wz", "v", axis=0),
           node("Conv", "d v", "e"), node("QuantizeLinear", "e ys yz", "c"), back]
    three = [node("DynamicQuantizeLinear", "x", "q s z"), node("ConvInteger", "q w z", "i"),
             node("Cast", "i", "f", to=TensorProto.FLOAT), node("Mul", "f s", "y")]
    for nodes, step in ((one, 0.5), (two, 0.5), (three, 1e-3)):
        path = save(tmp_path / "m.onnx", nodes, scale | zero | kernel)
        (right,) = expected(path, random(*IMAGE))
        model = load_onnx(path)
        assert any(isinstance(layer, nnx.Conv) for _, layer in nnx.iter_modules(model))
        wrong = np.abs(run(model, nhwc(random(*IMAGE))) - nhwc(right))
        assert wrong.max() <= step * 1.001 and np.mean(wrong > 1e-3) < 2e-3


def test_quantized_lstm(tmp_path):
    rng = np.random.default_rng(2)
    # Weights of 7 bits: ONNX Runtime's sums of products of 8 bits overflow on some machines.
    weights = {"w": rng.integers(-63, 63, (2, 96, 20)).astype(np.int8), "u": rng.integers(-63, 63, (2, 5, 20)).astype(np.int8),
               "b": random(2, 40), "ws": np.array([0.003, 0.002], np.float32), "us": np.array([0.004, 0.005], np.float32),
               "z": np.zeros(2, np.int8), "s": np.array([9, 1, -1])}
    lstm = helper.make_node("DynamicQuantizeLSTM", ["r", "w", "u", "b", "", "", "", "", "ws", "z", "us", "z"], ["y"],
                            name="the_y", domain="com.microsoft", hidden_size=5, direction="bidirectional")
    path = save(tmp_path / "m.onnx", [node("Reshape", "x s", "r"), lstm], weights)
    file = onnx.load(path)
    file.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(file, path)
    (right,) = expected(path, random(*IMAGE))
    np.testing.assert_allclose(run(load_onnx(path), nhwc(random(*IMAGE))), right.transpose(0, 2, 3, 1), rtol=0, atol=1e-2)


def test_external_data(tmp_path):
    nodes, constants = OPERATORS["conv"]
    path = save(tmp_path / "whole.onnx", nodes, constants)
    model = onnx.load(path)
    external = tmp_path / "model.onnx"
    onnx.save_model(model, external, save_as_external_data=True, location="weights.bin", size_threshold=0)
    agree(external, random(*IMAGE), 432)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ValueError, match="in another file that cannot be read .* put it beside the model"):
        load_onnx(external)


@pytest.mark.parametrize("coordinates", [False, True])
def test_sparse_initializers(tmp_path, coordinates):
    kernel = random(10, 6, 3, 3) * (np.random.default_rng(5).random((10, 6, 3, 3)) < 0.2)
    indices = np.argwhere(kernel) if coordinates else np.flatnonzero(kernel)
    values = numpy_helper.from_array(kernel[kernel != 0], "w")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(indices.astype(np.int64), "i"), kernel.shape)
    model = load_onnx(save(tmp_path / "m.onnx", [node("Conv", "x w", "y")], sparse=[sparse]))
    np.testing.assert_array_equal(model.layers["the_y"].kernel[...], kernel.transpose(2, 3, 1, 0))
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(indices.astype(np.int64) + 600, "i"), kernel.shape)
    with pytest.raises(ValueError):
        load_onnx(save(tmp_path / "m.onnx", [node("Conv", "x w", "y")], sparse=[sparse]))


def test_it_is_planned_folded_and_packed(tmp_path):
    random_mask = np.random.default_rng(6).random((32, 16, 3, 3)) < 0.05
    constants = {"w": random(16, 6, 3, 3), "v": random(32, 16, 3, 3) * random_mask, "s": random(32), "b": random(32, seed=1),
                 "m": random(32, seed=2), "var": np.abs(random(32, seed=3)), "g": random(32 * 28 * 28 // 4, 10)}
    path = save(tmp_path / "m.onnx", [
        node("Conv", "x w", "a", pads=[1] * 4), node("Relu", "a", "c"), node("Conv", "c v", "d", pads=[1] * 4),
        node("BatchNormalization", "d s b m var", "e"), node("Relu", "e", "r"),
        node("MaxPool", "r", "p", kernel_shape=[2, 2], strides=[2, 2]), node("Flatten", "p", "f"), node("Gemm", "f g", "y"),
    ], constants, shape=(2, 6, 28, 28))
    x = random(2, 6, 28, 28)
    model = agree(path, x, 54 * 144 * 6272, scale=1.0)
    plan = sparseflax.plan(model, jnp.asarray(nhwc(x)), HERE)
    rows = {row.path: row for row in plan.layers}
    assert rows["layers/the_d"].norm == "layers/the_e"
    assert rows["layers/the_d"].choice == "sparse"
    packed = sparseflax.pack_model(model, plan)
    assert isinstance(packed.layers["the_d"], sparseflax.nnx.SparseConv)
    agree(path, x, 54 * 144 * 6272, model=packed)
    np.testing.assert_allclose(run(packed, nhwc(x)), packed(jnp.asarray(nhwc(x))), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("kwargs", [dict(pads=[1, 1]), dict(strides=[2], dilations=[2]), dict(group=2, auto_pad="SAME_UPPER")])
def test_1d_convolutions_go_sparse(tmp_path, kwargs):
    kernel = random(16, 16 // kwargs.get("group", 1), 3)
    kernel = (kernel * (np.random.default_rng(1).random(kernel.shape) < 0.1)).astype(np.float32)
    nodes = [node("Conv", "x w b", "c", **kwargs), node("Relu", "c", "y")]
    path = save(tmp_path / "m.onnx", nodes, {"w": kernel, "b": random(16)}, shape=(2, 16, 40))
    model, x = load_onnx(path), random(2, 16, 40, seed=2)
    table = sparseflax.plan(model, x, HERE)
    assert [(row.choice, row.shape.kh, row.shape.kw) for row in table.layers if row.shape] == [("sparse", 1, 3)]
    packed = sparseflax.pack_model(model, table)
    (wanted,) = expected(path, x)
    # Sums of at most 48 products and a bias, in another order.
    magnitude = np.abs(kernel).sum((1, 2)).max() * np.abs(x).max() + np.abs(random(16)).max()
    np.testing.assert_allclose(packed(x), wanted, rtol=0, atol=2 * 50 * U * magnitude)
    assert "'relu'" in str(jax.make_jaxpr(packed)(x)), "the activation joins it"


def body(name, nodes, inputs=(), outputs=(), constants=()):
    """A graph that a node holds: inputs {name: type}, outputs names."""
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in dict(constants).items()]
    takes, gives = ([helper.make_tensor_value_info(name, kind, None if kind == F else ()) for name, kind in dict(some).items()]
                    for some in (inputs, outputs))
    return helper.make_graph(list(nodes), name, takes, gives, tensors)


F, I64, B = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def sized(size):
    """Nodes of a condition: whether x has `size` channels, as exporters ask before they squeeze."""
    return [node("Shape", "x", "s"), node("Gather", "s one", "c"), node("Equal", "c wanted", "test")], {
        "one": np.int64(1), "wanted": np.int64(size)}


@pytest.mark.parametrize("size", [IMAGE[1], 3])
def test_a_branch_that_sizes_choose(tmp_path, size):
    nodes, constants = sized(size)
    then = body("then", [node("Conv", "r w", "k", pads=[1, 1, 1, 1]), node("Relu", "k", "t")], outputs={"t": F})
    other = body("else", [node("Mul", "r two", "k"), node("ReduceSum", "k axes", "e", keepdims=1)], outputs={"e": F},
                 constants={"two": np.float32(2), "axes": np.array([1])})
    nodes += [node("Relu", "x", "r"), node("If", "test", "y", then_branch=then, else_branch=other)]
    agree(save(tmp_path / "m.onnx", nodes, constants | {"w": random(6, 6, 3, 3)}), random(*IMAGE), 60)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_branch_that_data_choose(tmp_path, sign):
    then = body("then", [node("Conv", "r w", "k", pads=[1, 1, 1, 1]), node("Relu", "k", "t")], outputs={"t": F})
    other = body("else", [node("Mul", "r two", "e")], outputs={"e": F}, constants={"two": np.float32(2)})
    nodes = [node("Abs", "x", "r"), node("ReduceSum", "x", "s", keepdims=0), node("Greater", "s zero", "test"),
             node("If", "test", "k", then_branch=then, else_branch=other), node("Neg", "k", "y")]
    agree(save(tmp_path / "m.onnx", nodes, {"zero": np.float32(0), "w": random(6, 6, 3, 3)}), sign * np.abs(random(*IMAGE)), 60)


@pytest.mark.parametrize("count, going", [(3, 9), (9, 2), (None, 4)])
def test_a_counted_loop(tmp_path, count, going):
    step = body("body", [node("Mul", "h half", "n"), node("Add", "n x", "m"), node("Less", "i last", "on"),
                         node("ReduceMean", "m", "mean", keepdims=0)],
                inputs={"i": I64, "_": B, "h": F}, outputs={"on": B, "m": F, "mean": F},
                constants={"half": np.float32(0.5), "last": np.int64(going)})
    nodes = [helper.make_node("Loop", ["count" if count else "", "", "x"], ["y", "z"], name="the_loop", body=step)]
    constants = {"count": np.int64(count)} if count else {}
    path = save(tmp_path / "m.onnx", nodes, constants, outputs=("y", "z"))
    x = random(*IMAGE)
    y, z = load_onnx(path)(nhwc(x))
    wanted, means = expected(path, x)
    np.testing.assert_allclose(y, nhwc(wanted), rtol=0, atol=10 * U * np.abs(wanted).max())
    assert z.shape == means.shape == (min(count or 99, going + 1),)
    np.testing.assert_allclose(z, means, rtol=0, atol=x.size * U * np.abs(wanted).max())


@pytest.mark.parametrize("nodes, message", [
    ([node("ReduceSum", "x", "s", keepdims=0), node("Greater", "s zero", "test"),
      node("If", "test", "y", then_branch=body("t", [node("Relu", "x", "a")], outputs={"a": F}),
           else_branch=body("e", [node("ReduceSum", "x", "b", keepdims=0)], outputs={"b": F}))],
     r"If 'the_y': its condition of shape \(\) is computed from the data, and its branches return \[\('float32', \(2, 6"),
    ([node("If", "on", "y", then_branch=body("t", [node("Unique", "x", "a"), node("Relu", "x", "c")], outputs={"a": F}),
           else_branch=body("e", [node("Concat", "x x", "b")], outputs={"b": F}))],
     "Concat 'the_b': it has no attribute 'axis'; Unique 'the_a': how much it returns depends on the data"),
    ([node("If", "on", "y", then_branch=body("t", [node("Relu", "x", "a")], outputs={"a": F}), else_branch=3)],
     "If 'the_y': it has no attribute 'else_branch'"),
    ([helper.make_node("Loop", ["", "", "x"], ["y"], name="the_y", body=body(
        "b", [node("Neg", "h", "n"), node("Identity", "g", "k")], {"i": I64, "g": B, "h": F}, {"k": B, "n": F}))],
     "Loop 'the_y': it takes more than 1024 steps"),
    ([helper.make_node("Loop", ["none", "", "x"], ["h", "y"], name="the_y", body=body(
        "b", [node("Neg", "h", "n"), node("Identity", "g", "k"), node("Abs", "h", "a")],
        inputs={"i": I64, "g": B, "h": F}, outputs={"k": B, "n": F, "a": F}))],
     "Loop 'the_y': it takes no step, and what each would add is not known"),
])
def test_what_of_inner_graphs_is_refused(tmp_path, nodes, message):
    refuses(save(tmp_path / "m.onnx", nodes, {"zero": np.float32(0), "on": np.bool_(True), "none": np.int64(0)}), message)


def refuses(path, message):
    with pytest.raises(ValueError, match=message):
        load_onnx(path)


def test_all_that_is_unsupported_is_named_at_once(tmp_path):
    path = save(tmp_path / "m.onnx", [node("Unique", "x", "a"), node("NonZero", "x", "b"), node("Det", "x", "d"),
                                      node("Scan", "b a d", "c"), node("Relu", "c", "y")])
    refuses(path, "Unique 'the_a': how much it returns depends on the data, .*; Scan 'the_c': it holds a graph of its own")
    refuses(save(tmp_path / "m.onnx", [node("Sine", "x", "y")]), "Sine 'the_y': unknown operator. Replace")
    path = save(tmp_path / "m.onnx", [node("NonZero", "x", "a"), node("MaxPool", "x", "b", kernel_shape=[2]),
                                      node("Relu", "x", "c"), node("Concat", "a b c", "y", axis=0)])
    refuses(path, "NonZero 'the_a': its input is computed from the data, wanted a constant or sizes; MaxPool 'the_b': "
                  r"kernel_shape=\(2,\) on an image of 2 dimensions. Replace")
    assert "Relu" not in str(pytest.raises(ValueError, load_onnx, path).value)


@pytest.mark.parametrize("nodes, constants, message", [
    ([node("Conv", "x w", "y")], {"w": random(4, 6, 3)}, "its weights take 6 channels in 3 dimensions, its input has shape"),
    ([node("Conv", "x w", "y")], {"w": np.ones((4, 6, 3, 3), np.int8)}, "its weights are int8, wanted floating point"),
    ([node("Conv", "x w", "y", kernel_shape=[1, 3])], W3, "its kernel_shape is .*, its kernel"),
    ([node("Conv", "x w b", "y")], {"w": W3["w"], "b": random(9)}, r"its bias is float32 of shape \(9,\), wanted"),
    ([node("MaxPool", "x", "y i", kernel_shape=[2, 2])], {}, "2 outputs, wanted one"),
    ([node("MaxPool", "x", "y", kernel_shape=[2, 2, 2])], {}, "on an image of 2 dimensions"),
    ([node("MaxPool", "x", "y", kernel_shape=[2, 2], pads=[-1, 0, 0, 0])], {}, "pads=.*, wanted 4 numbers"),
    ([node("Flatten", "x", "y", axis=5)], {}, r"axis 5 of an input of shape \(2, 6, 9, 8\)"),
    ([node("Reshape", "x s", "y")], {"s": np.array([0, 7, -1])}, r"a shape of \[2, 7, 61\] for an input of shape"),
    ([node("ReduceMean", "x", "y", axes=[4])], {}, r"axis 4 of a tensor of shape \(2, 6, 9, 8\), which has 4"),
    ([node("Squeeze", "x w", "y")], {"w": np.array([0])}, r"axes \(0,\) of an input of shape"),
    ([node("Cast", "x", "c", to=TensorProto.INT64), node("Reshape", "x c", "y")], {}, "its shape is computed from the data"),
    ([node("Gemm", "x w", "y", transA=1)], {"w": random(2, 2)}, r"its inputs have shapes .* and \(2, 2\), wanted matrices"),
    ([node("Expand", "x s", "y")], {"s": np.array([2, 5, 9, 8])}, "Expand 'the_y': shape mismatch"),
    ([node("BatchNormalization", "x b b b b", "y", training_mode=1)], {"b": random(6)}, "training_mode=1"),
    ([helper.make_node("Relu", ["x"], ["y"], name="r", domain="com.example")], {}, "com.example.Relu 'r': unknown operator"),
])
def test_what_is_refused(tmp_path, nodes, constants, message):
    refuses(save(tmp_path / "m.onnx", nodes, constants), message)


@pytest.mark.parametrize("nodes, constants, message", [
    ([node("Conv", "x", "y")], {}, "Conv 'the_y': it has 1 inputs, wanted 2 to 3"),
    ([node("Add", "x", "y")], {}, "Add 'the_y': it has 1 inputs, wanted 2"),
    ([helper.make_node("Concat", [], ["y"], name="the_y", axis=1)], {}, "Concat 'the_y': it has 0 inputs, wanted at least 1"),
    ([node("Concat", "x x", "y")], {}, "Concat 'the_y': it has no attribute 'axis'"),
    ([node("MaxPool", "x", "y")], {}, "MaxPool 'the_y': it has no attribute 'kernel_shape'"),
    ([node("LRN", "x", "y", size=0)], {}, "LRN 'the_y': size=0, wanted 1 or more"),
    ([node("Conv", "x w", "y", group=2.5)], W3, "Conv 'the_y': its attribute group is 2.5, wanted int"),
    ([node("Conv", "x w", "y", strides="two")], W3, "Conv 'the_y': its attribute strides is 'two', wanted ints"),
    ([node("Conv", "x w", "y", group=3)], W3, r"Conv 'the_y': group=3 with a kernel of shape .*, wanted a divisor"),
    ([node("Conv", "x w", "y", group=0)], W3, "Conv 'the_y': group=0"),
    ([node("Conv", "x w", "y")], {"w": random(8, 5, 3, 3)}, "Conv 'the_y': its weights take 5 channels, its input has 6"),
    ([node("GlobalAveragePool", "x", "g"), node("Flatten", "g", "f"), node("Relu", "f", "r"), node("Gemm", "r w", "y")],
     {"w": random(5, 3)}, "Gemm 'the_y': its weights take 5 features, its input has 6"),
    ([node("BatchNormalization", "x b b b b", "y")], {"b": random(7)},
     "BatchNormalization 'the_y': its weights take 7 channels, its input has 6"),
    ([node("Conv", "x w", "y")], {"w": random(0, 6, 3, 3)}, r"Conv 'the_y': its kernel has shape \(0, 6, 3, 3\), wanted"),
    ([node("Conv", "x w", "y", strides=[2])], W3, r"Conv 'the_y': strides=\(2,\), wanted 2 numbers, none below 1"),
    ([node("Conv", "x w", "y", dilations=[0, 1])], W3, r"Conv 'the_y': dilations=\(0, 1\), wanted 2 numbers, none below 1"),
    ([node("Conv", "x w", "y", pads=[1, 1])], W3, r"Conv 'the_y': pads=\(1, 1\), wanted 4 numbers"),
    ([node("Conv", "x w", "y", auto_pad="LEFT")], W3, "Conv 'the_y': auto_pad='LEFT', wanted NOTSET, VALID"),
    ([node("Clip", "x w", "y")], {"w": random(6)}, r"Clip 'the_y': its min is float32 of shape \(6,\), wanted one"),
    ([node("Reshape", "x s", "y")], {"s": np.array([[0]])},
     r"Reshape 'the_y': its shape is int64 of shape \(1, 1\), wanted a list"),
    ([node("BatchNormalization", "x s b b b", "y")], {"s": random(6), "b": random(5)},
     "BatchNormalization 'the_y': its scale, B, mean and var have 6, 5, 5 and 5 channels, wanted the same"),
    ([node("Flatten", "x", "f"), node("Gemm", "f w", "y")], {"w": random(431, 10)},
     "Gemm 'the_y': its weights take 431 features, its input has images of 6 channels"),
    ([node("Flatten", "x", "f"), node("Gemm", "f w", "y")], {"w": random(0, 10)}, "Gemm 'the_y': its weights have shape"),
])
def test_malformed_nodes_are_named(tmp_path, nodes, constants, message):
    refuses(save(tmp_path / "m.onnx", nodes, constants), message)


@pytest.mark.parametrize("name", OPERATORS)
def test_no_damage_to_a_node_escapes_as_another_error(name, tmp_path):
    """Every input and attribute missing, every attribute and weight of another kind: read all the same, or a ValueError."""
    nodes, constants = OPERATORS[name]
    damaged = []
    for index, sound in enumerate(nodes):
        def variant(change, index=index):
            copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
            change(copies[index])
            damaged.append((copies, constants))

        for number in range(len(sound.input)):
            variant(lambda node, number=number: node.input.pop(number))
        for number, entry in enumerate(sound.attribute):
            variant(lambda node, number=number: node.attribute.pop(number))
            for wrong in (-1, 0.5, "text", [], [7], [0] * 9):
                changed = helper.make_attribute(entry.name, wrong, attr_type=None if wrong != [] else onnx.AttributeProto.INTS)
                variant(lambda node, number=number, changed=changed: node.attribute[number].CopyFrom(changed))
    for constant in constants:
        for wrong in (random(), random(3, 2), random(0), np.array([1, -2, 3]), np.array("text")):
            damaged.append((nodes, constants | {constant: wrong}))
    for number, (nodes, constants) in enumerate(damaged):
        path = save(tmp_path / f"{number}.onnx", nodes, constants)
        try:
            load_onnx(path)
        except ValueError as error:
            assert "the_" in str(error) or "'y' of the graph's output" in str(error) or "decoded" in str(error), error


def test_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_onnx(tmp_path / "none.onnx")
    (tmp_path / "m.onnx").write_bytes(b"")
    refuses(tmp_path / "m.onnx", "holds no ONNX graph")
    (tmp_path / "m.onnx").write_bytes(b"\x7fELF nonsense")
    refuses(tmp_path / "m.onnx", "is no ONNX model")
    refuses(save(tmp_path / "m.onnx", [node("Conv", "x w b", "y")], {"b": random(4)}), "holds 'w' of Conv 'the_y'")
    refuses(save(tmp_path / "m.onnx", [node("Relu", "x", "a")]), "holds 'y' of the graph's output")
    refuses(save(tmp_path / "m.onnx", [node("Add", "x b", "a"), node("Relu", "a", "b"), node("Relu", "a", "y")]),
            "has a cycle through")
    refuses(save(tmp_path / "m.onnx", [node("Identity", "a", "b"), node("Identity", "b", "a"), node("Add", "x a", "y")]),
            "has a cycle through")
    refuses(save(tmp_path / "m.onnx", [node("Relu", "x", "y")], opset=5), "operator set 5, wanted 6 or later")
    refuses(save(tmp_path / "m.onnx", [node("Relu", "w", "y")], {"x": random(1), "w": random(1)}), "wanted an input")


def test_cycles_and_constants_that_are_too_large(tmp_path):
    billion = {"s": np.array([2**20, 2**20]), "v": random(2**20), "w": random(2**20, 1), "t": np.array([2**15, 2**15])}
    for nodes in ([node("ConstantOfShape", "s", "c")], [node("Expand", "v s", "c")], [node("Mul", "v w", "c")],
                  [node("Tile", "w t", "c")], [node("MatMul", "w u", "c")],
                  [node("Einsum", "v v", "c", equation="i,j->ij")]):
        path = save(tmp_path / "m.onnx", [*nodes, node("Add", "x c", "y")], billion | {"u": random(1, 2**20)})
        refuses(path, f"{nodes[0].op_type} 'the_c': it makes a constant of shape")
    many = [node("ConstantOfShape", "t", f"c{i}") for i in range(600)]
    refuses(save(tmp_path / "m.onnx", [*many, node("Add", "x c0", "y")], {"t": np.array([2**10, 2**10])}),
            "computes constants of .* numbers up to ConstantOfShape 'the_c")
    sparse = helper.make_sparse_tensor(numpy_helper.from_array(random(1), "w"),
                                       numpy_helper.from_array(np.array([0]), "i"), [2**20, 2**20])
    refuses(save(tmp_path / "m.onnx", [node("Conv", "x w", "y")], sparse=[sparse]), "it makes a constant of shape")


def test_windows_that_are_too_large(tmp_path):
    """Known by their sizes: nothing is made that is as large."""
    model = load_onnx(save(tmp_path / "m.onnx", [node("AveragePool", "x", "y", kernel_shape=[2**45, 1], pads=[2**44, 0] * 2)]))
    assert model is not None
    path = save(tmp_path / "m.onnx", [node("LRN", "x", "y", size=2**45)])
    assert load_onnx(path)(np.ones((2, 9, 8, 6))).shape == (2, 9, 8, 6)
    refuses(save(tmp_path / "m.onnx", [node("AveragePool", "x", "y", kernel_shape=[1, 1], pads=[2**44, 0] * 2)]),
            "AveragePool 'the_y': it makes a constant of shape")


def test_inputs_of_the_wrong_shape(tmp_path):
    nodes, constants = OPERATORS["gemm"]
    model = load_onnx(save(tmp_path / "m.onnx", nodes, constants))
    with pytest.raises(ValueError, match=r"shape \(2, 6, 9, 8\), wanted \(n, 9, 8, 6\): images go in as NHWC"):
        model(jnp.ones(IMAGE))
    with pytest.raises(ValueError, match="Gemm 'the_y': its weights take 432 features, its input has 486"):
        model(jnp.ones((2, 9, 9, 6)))
    model = load_onnx(save(tmp_path / "m.onnx", *OPERATORS["reshape, sized"]))
    with pytest.raises(ValueError, match=r"a shape of \[2, 432\] for an input of shape .*: the network's input has the wrong"):
        model(jnp.ones((2, 9, 9, 6)))
    path = save(tmp_path / "m.onnx", [node("Squeeze", "x a", "y")], {"a": np.array([2, 3])}, shape=(2, 6, "h", "w"))
    model = load_onnx(path)
    with pytest.raises(ValueError, match=r"axes \(2, 3\) of an input of shape \(2, 6, 9, 8\), wanted sizes of 1"):
        model(jnp.ones((2, 9, 8, 6)))
    refuses(save(tmp_path / "m.onnx", [node("Flatten", "x", "f"), node("Add", "x f", "y")]), "Add 'the_y': shape mismatch")


def test_the_page_lists_the_operators():
    page = (Path(__file__).parents[1] / "docs" / "how-to" / "onnx.md").read_text()
    listed = re.search(r"## Operators\n\n(.*?)\.\n", page, re.DOTALL)
    # words for what ONNX says otherwise
    ours = {"FlattenChannelsLast", "GroupedInstanceNormalization", "Rounded", "RoundedTo", "RoundedToItsRange", "Shifted"}
    assert "`If` and `Loop`" in page
    assert listed and set(re.split(r",\s+", listed[1])) == {*OPERATORS_READ, *QUANTIZED, "Constant"} - ours


def test_onnx_is_optional(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(ImportError, match=r"pip install 'sparseflax\[onnx\]'"):
        load_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize("name", NARROW)
def test_networks_written_and_read_again(name, tmp_path):
    make, size = NARROW[name]
    model = pruned(Spec(name, make, size, lambda path, shape: 0.5))
    x = random(2, size, size, 3)
    path = tmp_path / "m.onnx"
    path.write_bytes(to_onnx(model, x))
    (theirs,) = expected(path, x.transpose(0, 3, 1, 2))
    theirs = theirs.transpose(0, 2, 3, 1) if theirs.ndim == 4 else theirs
    ours, again = run(model, x), run(load_onnx(path), x)
    # As in `agree`; layers stretch no error by much, and their errors are independent, so that their squares add up.
    terms = sum(shape.weights // shape.oc for shape in sparseflax.conv_shapes(model, x).values())
    tolerance = 2 * 8 * terms**0.5 * U * np.abs(theirs).max()
    assert theirs.std(axis=0).max() > 20 * tolerance  # or another image would do
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)
    np.testing.assert_allclose(again, theirs, rtol=0, atol=tolerance)


def test_what_cannot_be_written_is_named_at_once():
    class Odd(nnx.Module):
        def __call__(self, x):
            return jnp.sin(x) + jnp.flip(x, 1) * jnp.cos(x)

    with pytest.raises(ValueError, match=r"cannot write \['cos', 'rev', 'sin'\]"):
        to_onnx(Odd(), np.ones((1, 4, 4, 4), np.float32))


@pytest.mark.parametrize("name", ["sizes computed", "conv transposed", "group norm spelled out", "recurrent"])
def test_every_damaged_file_is_read_or_a_value_error(name, tmp_path):
    """Thousands of mutations of whole networks: python -m experiments.foreign --mutations 4000."""
    data, rng = save(tmp_path / "m.onnx", *OPERATORS[name]).read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        (tmp_path / "m.onnx").write_bytes(foreign.mutated(data, rng))
        assert foreign.ending(tmp_path / "m.onnx") in ("read", "ValueError")
