"""Files that were quantized: they run in eight bits with their own ranges, and give what ONNX Runtime gives."""

import jax
import numpy as np
import onnx
import onnxruntime
import pytest
from flax import nnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

import sparseflax
from sparseflax.network.unroll import inlined
from sparseflax.nnx import Int8Conv
from sparseflax.onnx import load_onnx
from tests.machines import HERE

SIZE = 12


class Reader(CalibrationDataReader):
    def __init__(self, images):
        self.images = iter(images)

    def get_next(self):
        image = next(self.images, None)
        return None if image is None else {"x": image[None]}


def images(n, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal((n, 3, SIZE, SIZE))).astype(np.float32)


def nhwc(x):
    return x.transpose(0, 2, 3, 1)


class Graph:
    """A float32 network that is written node by node; weights of convolutions are pruned in blocks of four input channels."""

    def __init__(self):
        self.draw, self.nodes, self.weights = np.random.default_rng(3), [], {}

    def node(self, op, inputs, output, **attributes):
        self.nodes.append(helper.make_node(op, inputs.split(), output.split(), name=output, **attributes))

    def conv(self, x, y, ic, oc, k=3, stride=1, groups=1):
        kernel = self.draw.standard_normal((oc, ic // groups, k, k)) * np.sqrt(2 / (ic // groups * k * k))
        if ic % 4 == 0 and groups == 1:
            kernel *= np.repeat(self.draw.random((oc, ic // 4, k, k)) < 0.5, 4, axis=1) * np.sqrt(2)
        self.weights |= {f"{y}w": kernel, f"{y}b": 0.1 * self.draw.standard_normal(oc)}
        self.node("Conv", f"{x} {y}w {y}b", y, strides=[stride] * 2, pads=[k // 2] * 4, kernel_shape=[k, k], group=groups)

    def gemm(self, x, y, ic, oc):
        self.weights |= {f"{y}w": self.draw.standard_normal((oc, ic)) / np.sqrt(ic), f"{y}b": np.zeros(oc)}
        self.node("Gemm", f"{x} {y}w {y}b", y, transB=1)

    def save(self, path):
        tensors = [numpy_helper.from_array(np.asarray(array, np.float32), name) for name, array in self.weights.items()]
        x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
                for name, shape in (("x", ["n", 3, SIZE, SIZE]), ("y", ["n", 10])))
        model = helper.make_model(helper.make_graph(self.nodes, "network", [x], [y], tensors),
                                  opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model)
        onnx.save(model, path)
        return path


def residual(path):
    """Sums with an identity and with another convolution, a maximum, a mean, a fully connected layer."""
    graph = Graph()
    graph.conv("x", "a", 3, 16)
    graph.node("Relu", "a", "ar")
    graph.node("MaxPool", "ar", "p", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    graph.conv("p", "b", 16, 16)
    graph.node("Relu", "b", "br")
    graph.conv("br", "c", 16, 16)
    graph.node("Add", "c p", "s")
    graph.node("Relu", "s", "sr")
    graph.conv("sr", "d", 16, 32, stride=2)
    graph.conv("sr", "e", 16, 32, k=1, stride=2)
    graph.node("Add", "d e", "t")
    graph.node("GlobalAveragePool", "t", "g")
    graph.node("Flatten", "g", "f")
    graph.gemm("f", "y", 32, 10)
    return graph.save(path)


def branches(path):
    """A leaky rectifier, a concatenation, a depthwise convolution, a mean over windows, a gate, flattened images."""
    graph = Graph()
    graph.conv("x", "a", 3, 8)
    graph.node("Relu", "a", "ar")
    graph.conv("ar", "b", 8, 8)
    graph.conv("ar", "c", 8, 16, k=1)
    graph.node("LeakyRelu", "b", "bl", alpha=0.2)
    graph.node("Concat", "bl c", "d", axis=1)
    graph.conv("d", "e", 24, 24, groups=24)
    graph.node("AveragePool", "e", "f", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1],
               count_include_pad=1)
    graph.conv("f", "g", 24, 16, k=1)
    graph.node("Sigmoid", "g", "h")
    graph.node("Mul", "g h", "i")
    graph.conv("i", "j", 16, 8, stride=2)
    graph.node("Flatten", "j", "k")
    graph.gemm("k", "y", 8 * 9, 10)
    return graph.save(path)


def quantized(network, folder, **how):
    """Weights of 7 bits: ONNX Runtime's sums of two products of 8 overflow 16 bits on a CPU without dot products of bytes."""
    source, made = network(folder / "float32.onnx"), folder / "int8.onnx"
    quantize_static(source, made, Reader(images(16)), reduce_range=True, **how)
    return made


def steps_off(path, ours, x):
    """By how many steps of the last layer outputs differ from ONNX Runtime's."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    scale = next(numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer if t.name == "y_scale")
    return np.abs(ours - session.run(None, {"x": x})[0]) / scale


def programs(packed, x):
    """The native programs of a call."""
    def walk(jaxpr):
        for equation in jaxpr.eqns:
            inner = inlined(equation)
            if equation.primitive.name == "sparse_program":
                yield equation.params["program"]
            elif inner is not None:
                yield from walk(inner.jaxpr)

    return list(walk(jax.make_jaxpr(lambda m, x: m(x))(packed, x).jaxpr))


call = jax.jit(lambda m, x: m(x))  # one for all: what was compiled for a model is found again


def run(model, x):
    return np.asarray(call(model, x))


WAYS = [(QuantFormat.QDQ, QuantType.QUInt8, True), (QuantFormat.QDQ, QuantType.QInt8, False),
        (QuantFormat.QOperator, QuantType.QUInt8, False), (QuantFormat.QOperator, QuantType.QInt8, True)]


@pytest.mark.parametrize(("form", "activations", "per_channel"), WAYS)
@pytest.mark.parametrize("network", [residual, branches])
def test_a_quantized_file_runs_in_eight_bits_as_it_says(tmp_path, network, form, activations, per_channel):
    """Sums of integers are exact. What is rounded between them is computed by other operations of float32, so that one number
    may fall to the other side of a tie, which is a step of its layer, and about as much of the last one's."""
    path = quantized(network, tmp_path, quant_format=form, activation_type=activations, per_channel=per_channel)
    model, x = load_onnx(path), images(4, seed=1, scale=1.5)  # beyond the ranges, too
    plan = sparseflax.plan(model, nhwc(x), HERE, precision="int8")
    rows = {row.path: row for row in plan.layers}
    assert all("as the model rounds it" in row.reason for row in rows.values() if row.shape.groups == 1)
    packed = sparseflax.pack_model(model, plan)
    (program,) = programs(packed, nhwc(x))
    made = [step.op for step in program.steps]
    assert made.count("conv_int8") == sum(row.inputs is not None for row in rows.values()) == len(rows) - (network is branches)
    assert "combine" not in made or network is branches  # sums are the convolutions' own
    for ours in (run(packed, nhwc(x)), run(model, nhwc(x))):
        off = steps_off(path, ours, x)
        assert off.max() < 2.01 and np.mean(off > 0.01) < 0.1


def test_a_depthwise_layer_says_why_it_stays_float32(tmp_path):
    path = quantized(branches, tmp_path)
    for examples in (None, nhwc(images(16))):
        plan = sparseflax.plan(load_onnx(path), nhwc(images(1)), HERE, precision="int8", examples=examples)
        assert {row.path: row for row in plan.layers}["layers/e"].reason == "depthwise: 1 input channel per group"


def test_float32_of_a_quantized_file_keeps_its_meaning(tmp_path):
    path = quantized(residual, tmp_path)
    model, x = load_onnx(path), images(4, seed=1)
    packed = sparseflax.pack_model(model, sparseflax.plan(model, nhwc(x), HERE))
    off = steps_off(path, run(packed, nhwc(x)), x)
    assert off.max() < 2.01 and np.mean(off > 0.01) < 0.1


def test_zeros_stay_zeros_in_words_of_four(tmp_path):
    path = quantized(residual, tmp_path, per_channel=True)
    model, x = load_onnx(path), nhwc(images(1))
    packed = sparseflax.pack_model(model, sparseflax.plan(model, x, HERE, precision="int8"))
    layer = packed.layers["b"]
    assert isinstance(layer, Int8Conv)
    kernel = np.asarray(model.layers["b"].kernel[...])
    words = kernel.reshape(3, 3, 4, 4, 16).any(3)
    assert 0.4 < words.mean() < 0.6 and layer.kernel.pattern.nnz == words.sum()
    np.testing.assert_array_equal(layer.kernel.unpack(), kernel)


def test_a_saved_network_comes_back(tmp_path):
    model, x = load_onnx(quantized(residual, tmp_path)), nhwc(images(2))
    plan = sparseflax.plan(model, x, HERE, precision="int8")
    packed = sparseflax.pack_model(model, plan)
    sparseflax.save(tmp_path / "packed.safetensors", packed, plan)
    again, _ = sparseflax.load(tmp_path / "packed.safetensors", model)
    np.testing.assert_array_equal(run(again, x), run(packed, x))


def edited(path, edit):
    """The file with one array of its weights changed: of the layer "b"."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name.startswith("bw_") and tensor.name != "bw_scale":
            tensor.CopyFrom(numpy_helper.from_array(edit(numpy_helper.to_array(tensor)), tensor.name))
    onnx.save(model, path)
    return path


def test_weights_that_do_not_fit_stay_float32(tmp_path):
    """-128 is no int8 weight of the kernel."""
    path = edited(quantized(residual, tmp_path), lambda array: np.where(array == array.min(), -128, array).astype(np.int8)
                  if array.ndim == 4 else array)
    model, x = load_onnx(path), images(2)
    plan = sparseflax.plan(model, nhwc(x), HERE, precision="int8")
    row = {row.path: row for row in plan.layers}["layers/b"]
    assert row.inputs is None
    assert row.reason.endswith("float32: its weights are up to 128 steps in the model, int8 has 127 at most")
    assert sum(row.inputs is not None for row in plan.layers) == len(plan.layers) - 1
    assert steps_off(path, run(sparseflax.pack_model(model, plan), nhwc(x)), x).max() < 2.01


@pytest.mark.parametrize("zero", [128, 120])
def test_uint8_weights_are_shifted_where_they_fit(tmp_path, zero):
    path = edited(quantized(residual, tmp_path), lambda array: (array.astype(int) + zero).clip(0, 255).astype(np.uint8))
    model, x = load_onnx(path), images(2)
    plan = sparseflax.plan(model, nhwc(x), HERE, precision="int8")
    assert all(row.inputs is not None for row in plan.layers)  # 7 bits fit, wherever their zero is
    packed = sparseflax.pack_model(model, plan)
    np.testing.assert_allclose(run(packed, nhwc(x)), model(nhwc(x)), rtol=0, atol=1e-5)


def test_layers_that_were_changed_want_examples(tmp_path):
    model, x = load_onnx(quantized(residual, tmp_path)), nhwc(images(16))
    kernel = model.layers["b"].kernel
    kernel.set_value(kernel[...] * 1.01)
    row = {row.path: row for row in sparseflax.plan(model, x, HERE, precision="int8").layers}["layers/b"]
    assert row.inputs is None and row.reason.endswith("does not round its inputs and weights to eight bits, give examples")
    plan = sparseflax.plan(model, x, HERE, precision="int8", examples=x)
    changed, same = ({row.path: row for row in plan.layers}[f"layers/{name}"] for name in "bc")
    assert changed.error is not None and 0 < changed.error < 0.02 and same.error is None
    assert changed.inputs == {row.path: row for row in plan.layers}["layers/b"].inputs


class Stated(nnx.Module):
    """Two layers that say their ranges; nothing here is of ONNX."""

    ranges = sparseflax.Quantization(0.0517, 128), sparseflax.Quantization(0.0213, 0)

    def __init__(self, between=lambda x: 0):
        rngs, self.between = nnx.Rngs(0), between
        self.first, self.second = nnx.Conv(8, 16, (3, 3), rngs=rngs), nnx.Conv(16, 16, (3, 3), rngs=rngs)
        for layer in (self.first, self.second):
            layer.kernel.set_value(np.round(np.asarray(layer.kernel[...]) * 100) / np.float32(100))
            layer.kernel_scale = nnx.Variable(np.full(layer.kernel.shape[-1], 0.01, np.float32))

    def __call__(self, x):
        x = nnx.relu(self.first(self.ranges[0].quantize(x).dequantize()))
        x = self.ranges[1].quantize(x).dequantize()
        return self.between(x) + self.second(x)


@pytest.mark.parametrize("cut", [False, True])
def test_a_model_can_say_its_ranges_itself(cut):
    """Also where what is rounded is needed by what is no step, too: it is not computed twice."""
    model = Stated(lambda x: jax.lax.sort(x) if cut else 0)
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 8)).astype(np.float32)
    plan = sparseflax.plan(model, x, HERE, precision="int8")
    assert [row.inputs for row in plan.layers] == list(Stated.ranges)
    packed = sparseflax.pack_model(model, plan)
    made = [step.op for program in programs(packed, x) for step in program.steps]
    assert made.count("conv_int8") == 2 and (cut or len(programs(packed, x)) == 1)
    np.testing.assert_allclose(run(packed, x), model(x), rtol=0, atol=1e-4)


def test_what_says_nothing_wants_examples():
    model = nnx.Sequential(nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(0)), nnx.relu)
    with pytest.raises(ValueError, match='precision="auto" wants examples=inputs, .* does not round its layers'):
        sparseflax.plan(model, np.ones((1, 8, 8, 8), np.float32), HERE, precision="auto")
