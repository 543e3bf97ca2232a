"""Files of dynamic quantization: layers of integers and the scales around them are layers, in float32 or eight bits."""

import numpy as np
import onnx
import pytest
from flax import nnx
from onnx import TensorProto
from onnxruntime.quantization import QuantType, quantize_dynamic

import sparseflax
from sparseflax.nnx import Int8Conv
from sparseflax.onnx import load_onnx
from sparseflax.onnx.integer import RoundsToRange
from tests.machines import HERE
from tests.test_onnx import expected, node, random, save
from tests.test_onnx_int8 import images, nhwc, programs, residual, run

KINDS = [(QuantType.QInt8, False), (QuantType.QInt8, True), (QuantType.QUInt8, True)]


def quantized(folder, weight_type=QuantType.QInt8, per_channel=True):
    """The float32 network and the one that ONNX Runtime makes of it; with weights of 7 bits, as its sums may saturate."""
    source, made = residual(folder / "float32.onnx"), folder / "dynamic.onnx"
    quantize_dynamic(source, made, weight_type=weight_type, per_channel=per_channel, reduce_range=True)
    assert sum(node.op_type in ("ConvInteger", "MatMulInteger") for node in onnx.load(made).graph.node) == 6
    return source, made


@pytest.mark.parametrize(("weight_type", "per_channel"), KINDS)
def test_float32_is_what_onnx_runtime_computes(tmp_path, weight_type, per_channel):
    """Packed or not. Float32 sums of products differ by their rounding, so that one number may fall to the other side of a
    tie, which is a part in 255 of its tensor's range."""
    _, path = quantized(tmp_path, weight_type, per_channel)
    model, x = load_onnx(path), images(4, seed=1)
    (want,) = expected(path, x)
    packed = sparseflax.pack_model(model, sparseflax.plan(model, nhwc(x), HERE))
    for ours in (run(model, nhwc(x)), run(packed, nhwc(x))):
        off = np.abs(ours - want) / np.abs(want).max()
        assert off.max() < 2.01 / 255 and np.mean(off > 1e-5) < 0.1


@pytest.mark.parametrize(("weight_type", "per_channel"), KINDS)
def test_eight_bits_take_the_weights_of_the_file_and_the_ranges_of_examples(tmp_path, weight_type, per_channel):
    source, path = quantized(tmp_path, weight_type, per_channel)
    model, x = load_onnx(path), images(64, seed=1)
    with pytest.raises(ValueError, match="wants examples=inputs"):
        sparseflax.plan(model, nhwc(x[:4]), HERE, precision="int8")
    plan = sparseflax.plan(model, nhwc(x[:4]), HERE, precision="int8", examples=nhwc(x))
    packed = sparseflax.pack_model(model, plan)
    assert len(plan.layers) == 6 and all(row.inputs is not None for row in plan.layers)
    for name, held in packed.layers.items():
        assert isinstance(held, RoundsToRange) and isinstance(held.layer, Int8Conv)
        kernel = model.layers[name].layer.kernel[...]
        np.testing.assert_array_equal(np.reshape(held.layer.kernel.unpack(), kernel.shape), kernel)
    (program,) = programs(packed, nhwc(x[:4]))  # what the file rounds by its range is rounded in the layers
    made = [step.op for step in program.steps]
    assert made.count("conv_int8") == 6 and "combine" not in made  # biases and sums are theirs
    exact, theirs, ours = expected(source, x[:4])[0], expected(path, x[:4])[0], run(packed, nhwc(x[:4]))
    # Of the same weights, with 255 steps for the range of all examples in place of that of these four.
    assert np.linalg.norm(ours - theirs) < np.linalg.norm(theirs - exact)
    sparseflax.save(tmp_path / "packed", packed, plan)
    again, _ = sparseflax.load(tmp_path / "packed", model)
    np.testing.assert_array_equal(run(again, nhwc(x[:4])), ours)


draw = np.random.default_rng(4)
WEIGHTS = {"w": draw.integers(-60, 60, (10, 6, 3, 3)).astype(np.int8), "wz": np.int8(3), "ws": np.float32(0.01),
           "each": draw.uniform(0.01, 0.02, (1, 10, 1, 1)).astype(np.float32), "b": random(10, seed=2).reshape(1, 10, 1, 1),
           "flat": random(10, seed=2), "shape": np.array([1, -1, 1, 1]), "odd": random(1, 10, 1, 7, seed=3),
           "xs": np.float32(0.05), "xz": np.uint8(120), "zero": np.uint8(7), "both": np.float32(0.0005)}
DYNAMIC, STATIC = node("DynamicQuantizeLinear", "x", "q s z"), node("QuantizeLinear", "x xs xz", "q")
CONV, CAST = node("ConvInteger", "q w z wz", "i", pads=[1, 0, 0, 1]), node("Cast", "i", "f", to=TensorProto.FLOAT)
FIXED = node("ConvInteger", "q w xz", "i")
# Nodes, whether a layer of float32 comes of them, and whether it has the bias.
GRAPHS = {
    "bias": ([DYNAMIC, CONV, CAST, node("Mul", "s ws", "t"), node("Mul", "t f", "m"), node("Add", "b m", "y")], True, True),
    "reshaped bias": ([node("Reshape", "flat shape", "r"), DYNAMIC, CONV, CAST, node("Mul", "ws s", "t"),
                       node("Mul", "f t", "m"), node("Add", "m r", "y")], True, True),
    "no bias": ([DYNAMIC, CONV, CAST, node("Mul", "s ws", "t"), node("Mul", "f t", "m"), node("Add", "m odd", "y")],
                True, False),
    "no scale": ([DYNAMIC, CONV, CAST, node("Mul", "f s", "y")], True, False),
    "static": ([STATIC, FIXED, CAST, node("Mul", "f both", "y")], True, False),
    "static scales": ([STATIC, FIXED, CAST, node("Mul", "xs ws", "t"), node("Mul", "f t", "y")], True, False),
    "scales of channels": ([DYNAMIC, CONV, CAST, node("Mul", "s each", "t"), node("Mul", "f t", "y")], False, False),
    "another zero": ([DYNAMIC, node("ConvInteger", "q w zero", "i"), CAST, node("Mul", "f s", "y")], False, False),
    "another scale": ([DYNAMIC, CONV, CAST, node("Mul", "f ws", "y")], False, False),
    "integers": ([DYNAMIC, CONV, CAST, node("Mul", "f s", "m"), node("Cast", "i", "g", to=TensorProto.FLOAT),
                  node("Add", "m g", "y")], False, False),
    "scale and numbers": ([DYNAMIC, CONV, CAST, node("Mul", "f s", "m"), node("Add", "m s", "a"),
                           node("DequantizeLinear", "q s z", "d"), node("ReduceMax", "d", "e", keepdims=0),
                           node("Add", "a e", "y")], True, False),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_layers_of_integers_agree_with_onnx_runtime(tmp_path, name):
    """Whether they are layers of float32 or not: each of 54 products and sums is rounded, by a part of the products' sizes."""
    nodes, is_layer, biased = GRAPHS[name]
    x = random(2, 6, 9, 8)
    path = save(tmp_path / "m.onnx", nodes, WEIGHTS)
    (want,) = expected(path, x)
    model = load_onnx(path)
    (layer,) = (layer for _, layer in nnx.iter_modules(model) if isinstance(layer, nnx.Conv))
    ours = run(model, nhwc(x))
    layer.kernel.set_value(np.abs(layer.kernel[...]))
    sizes = run(model, nhwc(np.abs(x))).max()
    np.testing.assert_allclose(ours, nhwc(want), rtol=0, atol=(54 + 6) * 2**-24 * sizes)
    assert hasattr(layer, "kernel_scale") == is_layer and (layer.bias is not None) == biased
    assert any(isinstance(held, RoundsToRange) for held in model.layers.values()) == (is_layer and "static" not in name)


@pytest.mark.parametrize("name", ["static", "static scales"])
def test_constant_ranges_are_the_files_in_eight_bits(tmp_path, name):
    x, path = random(2, 6, 9, 8), save(tmp_path / "m.onnx", GRAPHS[name][0], WEIGHTS)
    model = load_onnx(path)
    (row,) = (plan := sparseflax.plan(model, nhwc(x), HERE, precision="int8")).layers
    assert row.reason.endswith("int8, as the model rounds it") and row.inputs.zero == 120
    (want,) = expected(path, x)
    ours = run(sparseflax.pack_model(model, plan), nhwc(x))
    np.testing.assert_allclose(ours, nhwc(want), rtol=1e-5, atol=1e-6 * np.abs(want).max())


def test_flattened_images_are_rounded_too(tmp_path):
    """A MatMulInteger whose rows are in ONNX's order of the image; its scales are those of features."""
    weights = {"w": draw.integers(-60, 60, (6 * 4, 5)).astype(np.int8), "ws": draw.uniform(0.01, 0.02, 5).astype(np.float32)}
    nodes = [node("MaxPool", "x", "p", kernel_shape=[4, 4], strides=[4, 4]), node("Flatten", "p", "f"),
             node("DynamicQuantizeLinear", "f", "q s z"), node("MatMulInteger", "q w z", "i"),
             node("Cast", "i", "g", to=TensorProto.FLOAT), node("Mul", "s ws", "t"), node("Mul", "g t", "y")]
    x, path = random(2, 6, 9, 8), save(tmp_path / "m.onnx", nodes, weights)
    (want,) = expected(path, x)
    model = load_onnx(path)
    assert [step.node.op for step in model.program.steps] == ["MaxPool", "FlattenChannelsLast", "MatMul"]
    ours, (layer,) = run(model, nhwc(x)), (layer for _, layer in nnx.iter_modules(model) if isinstance(layer, nnx.Linear))
    layer.kernel.set_value(np.abs(layer.kernel[...]))
    np.testing.assert_allclose(ours, want, rtol=0, atol=(24 + 6) * 2**-24 * run(model, nhwc(np.abs(x))).max())
