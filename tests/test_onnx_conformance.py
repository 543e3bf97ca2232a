"""ONNX as others wrote it: the operator tests of the package onnx, its classic networks, trained networks of other packages."""

import re
import warnings

import jax
import numpy as np
import pytest

from experiments import foreign
from sparseflax.onnx import load_onnx
from tests.compilation import AS_FOR_USERS

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
from onnx import numpy_helper  # noqa: E402

# What convolutional networks are made of. The operators of quantized networks, and recurrent ones, are among them.
OPERATORS = set("""
    Add And ArgMax Attention AveragePool BatchNormalization Cast Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvInteger
    ConvTranspose CumSum DepthToSpace DequantizeLinear Div Dropout DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand Flatten
    Floor Gather GatherElements Gelu Gemm GlobalAveragePool GlobalMaxPool Greater GroupNormalization GRU HardSigmoid HardSwish
    Identity InstanceNormalization LayerNormalization LeakyRelu Less Log LogSoftmax LpNormalization LpPool LRN LSTM MatMul
    MatMulInteger Max MaxPool Mean MeanVarianceNormalization Min Mish Mul Neg OneHot Pad Pow PRelu QLinearConv QLinearMatMul
    QuantizeLinear Range Reciprocal ReduceL2 ReduceMax ReduceMean ReduceSum Relu Reshape Resize Selu Shape Sigmoid Slice
    Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tanh ThresholdedRelu Tile TopK Transpose Unsqueeze
    Upsample Where""".split())
# Training, sizes that depend on the data, indices of maxima, powers of two of 8 bits.
REFUSED = {
    "test_batchnorm_epsilon_training_mode", "test_batchnorm_example_training_mode", "test_cast_e8m0_FLOAT16_to_FLOAT8E8M0",
    "test_cast_e8m0_FLOAT8E8M0_to_FLOAT", "test_cast_e8m0_FLOAT8E8M0_to_FLOAT16", "test_cast_e8m0_FLOAT_to_FLOAT8E8M0",
    "test_constantofshape_float_ones", "test_constantofshape_int_shape_zero", "test_constantofshape_int_zeros",
    "test_maxpool_with_argmax_2d_precomputed_pads", "test_maxpool_with_argmax_2d_precomputed_strides",
    "test_range_bfloat16_type_positive_delta", "test_range_float16_type_positive_delta", "test_range_float_type_positive_delta",
    "test_range_int32_type_negative_delta", "test_training_dropout", "test_training_dropout_default",
    "test_training_dropout_default_mask", "test_training_dropout_mask", "test_training_dropout_zero_ratio",
    "test_training_dropout_zero_ratio_mask",
}
AT_ONCE = 100
UNOPTIMIZED = {"xla_backend_optimization_level": 0}


def compiled(models, inputs, options):
    """The outputs of many networks, from one compilation that optimizes nothing."""
    def run(models, inputs):
        return [model(x) for model, x in zip(models, inputs, strict=True)]

    return jax.jit(run).lower(models, inputs).compile(UNOPTIMIZED | options)(models, inputs)


def as_array(given):
    array = numpy_helper.to_array(given) if isinstance(given, onnx.TensorProto) else np.asarray(given)
    wide = {"float64": np.float32, "float16": np.float32, "int64": np.int32, "uint64": np.uint32}
    return array.astype(wide.get(array.dtype.name, array.dtype))


def defined(name, x):
    """Where ONNX says what comes out: not where a number is cast to an integer of few bits that does not hold it.

    There the expected values are what ml_dtypes happens to do: it wrapped around before 0.7, and since makes them 0.
    """
    few = re.search(r"cast\w*_to_(U?)INT([24])(?:_|$)", name)
    if not few:
        return np.s_[...]
    low, count = 0 if few[1] else -(2 ** (int(few[2]) - 1)), 2 ** int(few[2])
    return (x >= low) & (x < low + count)


def node_tests():
    """Operator tests of one node whose first input is no text and not empty; the other inputs made constants."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases
        cases = {case.name: case for case in collect_testcases(None)}
    for name, case in cases.items():
        graph, (inputs, outputs) = case.model.graph, case.data_sets[0]
        if len(graph.node) != 1 or graph.node[0].op_type not in OPERATORS or not inputs:
            continue
        x = as_array(inputs[0])
        if x.dtype.kind in "OSU" or not x.size:
            continue
        model = onnx.ModelProto.FromString(case.model.SerializeToString())
        for entry, given in zip(graph.input[1:], inputs[1:], strict=True):
            tensor = given if isinstance(given, onnx.TensorProto) else numpy_helper.from_array(np.asarray(given), entry.name)
            model.graph.initializer.append(tensor)
        yield name, model, x, [as_array(output) for output in outputs]


def test_operators_agree_with_the_tests_of_the_onnx_project(tmp_path):
    refused, loaded = set(), []
    for name, file, x, outputs in node_tests():
        onnx.save(file, tmp_path / "m.onnx")
        try:
            model = load_onnx(tmp_path / "m.onnx")
        except ValueError:
            refused.add(name)
            continue
        loaded.append((name, model, x.transpose(0, 2, 3, 1) if x.ndim == 4 and model.program.images[0] else x, outputs))
    # XLA's first emitter of fusions, which takes a third of the time, rounds wrongly to some floats of 8 bits.
    few_bits, others = ([test for test in loaded if bool(re.search("FLOAT[48]", test[0])) == few] for few in (True, False))
    for tests, options in [(few_bits, AS_FOR_USERS), *(
            (others[start:start + AT_ONCE], {}) for start in range(0, len(others), AT_ONCE))]:
        names, models, inputs, right = zip(*tests, strict=True)
        for name, model, x, ours, theirs in zip(names, models, inputs, compiled(models, inputs, options), right, strict=True):
            ours = ours if isinstance(ours, tuple) else (ours,)
            for mine, their, image in zip(ours, theirs, model.program.images[1:], strict=False):
                mine = np.asarray(mine)
                mine = mine.transpose(0, 3, 1, 2) if mine.ndim == 4 and image else mine
                assert mine.shape == their.shape, name
                # The ONNX project's own tolerances; numbers of 16 bits are computed as float32 here.
                loose = "16" in name or "lppool" in name
                where = defined(name, x)
                np.testing.assert_allclose(mine.astype(np.float64)[where], their.astype(np.float64)[where],
                                           rtol=1e-2 if loose else 1e-3, atol=1e-3 if loose else 1e-6, err_msg=name)
    assert refused == REFUSED
    assert len(loaded) >= 300


INSTALLED = foreign.installed()
OF_PACKAGES = {"ch_PP-OCRv4_det_infer": (1, 3, 64, 96), "ch_PP-OCRv4_rec_infer": (1, 3, 48, 72), "common": (1, 1, 64, 56),
               "ch_ppocr_mobile_v2.0_cls_infer": (2, 3, 48, 96), "light_squeezenet": (1, 3, 224, 224),
               "light_shufflenet": (1, 3, 224, 224)}


@pytest.mark.parametrize("name", OF_PACKAGES)
def test_networks_of_packages_agree_with_onnx_runtime(name):
    """The others, and other sizes: python -m experiments.foreign."""
    if name not in INSTALLED:
        pytest.skip("its package is not installed: pip install --no-deps rapidocr_onnxruntime==1.4.4 ddddocr==1.6.1")
    assert foreign.difference(INSTALLED[name], OF_PACKAGES[name], options=UNOPTIMIZED) < 1e-4
