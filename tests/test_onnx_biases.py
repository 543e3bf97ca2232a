"""What is added to each channel, or feature, of a layer without a bias is its bias; other additions stay what they are."""

import numpy as np
import pytest

import sparseflax
from sparseflax.onnx import load_onnx
from tests.machines import HERE
from tests.test_onnx import agree, nhwc, node, random, save
from tests.test_onnx_int8 import programs

CONV, TRANSPOSED = node("Conv", "x w", "c"), node("ConvTranspose", "x w", "c", strides=[2, 2])
MATMUL, GEMM = node("MatMul", "x w", "c"), node("Gemm", "x w", "c")
ADDED, SWAPPED = node("Add", "c b", "y"), node("Add", "b c", "y")
# Of the same size as the channels, images are wide: whoever adds to another axis is found out.
WIDE = {"w": random(10, 6, 3, 3)}, (2, 6, 8, 12)
UP = {"w": random(6, 10, 2, 2)}, (2, 6, 4, 5)
ONE = {"w": random(6, 1, 2, 2)}, (2, 6, 4, 5)
ROWS = {"w": random(7, 10)}, (3, 7)
VECTOR = {"w": random(7, 10)}, (7,)


@pytest.mark.parametrize(("nodes", "weights", "bias", "taken"), [
    ([CONV, ADDED], WIDE, (10, 1, 1), True),
    ([CONV, SWAPPED], WIDE, (1, 10, 1, 1), True),
    ([CONV, ADDED], WIDE, (10,), False),  # of a row's pixels
    ([CONV, ADDED], WIDE, (1, 1, 1, 10), False),
    ([CONV, ADDED], WIDE, (10, 1), False),  # of rows: none broadcasts to ten of six
    ([CONV, ADDED], WIDE, (2, 10, 1, 1), False),  # of images, too
    ([CONV, ADDED], WIDE, (1, 1, 10, 1, 1), False),  # which adds a dimension
    ([CONV, ADDED], WIDE, (), False),
    ([CONV, node("Add", "c c", "y")], WIDE, (10, 1, 1), False),
    ([CONV, node("Relu", "c", "r"), node("Add", "c b", "s"), node("Add", "s r", "y")], WIDE, (10, 1, 1), False),
    ([CONV, node("Sub", "c b", "y")], WIDE, (10, 1, 1), False),
    ([node("Conv", "x w d", "c"), ADDED], ({**WIDE[0], "d": random(10, seed=3)}, WIDE[1]), (10, 1, 1), False),
    ([node("Reshape", "v sizes", "b"), CONV, ADDED],
     ({**WIDE[0], "v": random(10, seed=3), "sizes": np.array([1, -1, 1, 1])}, WIDE[1]), (10, 1, 1), True),
    ([TRANSPOSED, ADDED], UP, (1, 10, 1, 1), True),
    ([TRANSPOSED, ADDED], ONE, (1, 1, 1, 1), True),
    ([MATMUL, ADDED], ROWS, (10,), True),
    ([MATMUL, SWAPPED], VECTOR, (10,), True),
    ([MATMUL, ADDED], VECTOR, (1, 10), False),  # which adds a dimension
    ([MATMUL, ADDED], ROWS, (3, 1), False),
    ([GEMM, ADDED], ROWS, (10,), True),
])
def test_what_is_added_to_each_channel(tmp_path, nodes, weights, bias, taken):
    constants, shape = weights
    constants = ({} if "v" in constants else {"b": random(*bias, seed=4)}) | constants
    if bias == (10, 1):
        constants["b"] = random(6, 1, seed=4)
    path = save(tmp_path / "m.onnx", nodes, constants, shape=shape)
    model = agree(path, random(*shape, seed=5), 64)
    layer = model.layers["the_c"]
    assert (layer.bias is not None and "the_y" not in (step.node.name for step in model.program.steps)) == taken
    if taken:
        np.testing.assert_array_equal(layer.bias[...], constants.get("v", constants.get("b")).ravel())


def test_what_comes_out_as_well_keeps_its_addition(tmp_path):
    constants, shape = WIDE
    constants = constants | {"b": random(10, 1, 1, seed=4)}
    path = save(tmp_path / "m.onnx", [CONV, ADDED], constants, shape=shape, outputs=("y", "c"))
    assert agree(path, random(*shape, seed=5), 64).layers["the_c"].bias is None


def test_a_norm_behind_a_transposed_convolution_and_its_added_bias_is_folded(tmp_path):
    """As a text detector ends: one convolution in eight bits whose outputs move to their places, nothing element by element."""
    constants = {"w": random(8, 16, 2, 2), "b": random(1, 16, 1, 1, seed=1), "s": random(16, seed=2), "t": random(16, seed=3),
                 "m": random(16, seed=4), "v": np.abs(random(16, seed=5)) + 0.5, "k": random(16, 16, 1, 1, seed=6)}
    path = save(tmp_path / "m.onnx", [
        TRANSPOSED, node("Add", "c b", "a"), node("BatchNormalization", "a s t m v", "n"), node("Relu", "n", "r"),
        node("Conv", "r k", "y")], constants, shape=(2, 8, 8, 8))
    model, x = load_onnx(path), nhwc(random(64, 8, 8, 8, seed=7))
    plan = sparseflax.plan(model, x[:2], HERE)
    assert {row.path: row.norm for row in plan.layers} == {"layers/the_c": "layers/the_n", "layers/the_y": None}
    agree(path, random(2, 8, 8, 8, seed=8), 8 * 16, scale=4.0, model=sparseflax.pack_model(model, plan))
    plan = sparseflax.plan(model, x[:2], HERE, precision="int8", examples=x)
    (program,) = programs(sparseflax.pack_model(model, plan), x[:2])
    assert [step.op for step in program.steps] == ["quantize", "conv_int8", "upsample", "conv_int8"]
