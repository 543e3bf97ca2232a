"""The packed format: exact round trips, sizes, storage, and what it refuses."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
from reference import normal_kernel

import sparseflax as sf
from sparseflax.conv.int8 import Quantization, pack_int8
from sparseflax.conv.packing import DENSE_BLOCK, SKIP, Pattern, channel_block

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def same_bits(a, b) -> bool:
    """Bit for bit, except that -0.0 is a zero."""
    bits = [np.where(v == 0, 0, v.view(np.int32)) for v in (np.asarray(a), np.asarray(b)) if v.dtype == np.float32]
    return len(bits) == 2 and np.array_equal(*bits)


@st.composite
def kernels(draw):
    groups = draw(st.integers(1, 3))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 40)), groups * draw(st.integers(1, 4)))
    values = st.floats(width=32, allow_nan=False, allow_infinity=False)  # subnormals and -0.0 too
    return draw(hnp.arrays(np.float32, shape, elements=values, fill=st.just(np.float32(0)))), groups


@hypothesis.given(kernels())
def test_unpack_is_the_inverse_of_pack(kernel_and_groups):
    kernel, groups = kernel_and_groups
    packed = sf.pack(kernel, groups)
    assert same_bits(packed.unpack(), kernel)
    assert packed.shape == kernel.shape and packed.groups == groups
    assert packed.nnz == np.count_nonzero(kernel) == packed.values.size
    assert packed.density == np.count_nonzero(kernel) / kernel.size
    assert same_bits(sf.PackedKernel.from_arrays(packed.to_arrays()).unpack(), kernel)


def test_stored_order_is_the_documented_one():
    """Position of (g, b, k, t) by the formula in the module's docstring, written out weight by weight."""
    random = np.random.default_rng(0)
    groups, ocg, icg, kh, kw = 2, 9, 40, 2, 3
    kernel = normal_kernel(random, (kh, kw, icg, groups * ocg), 0.004)  # sparse enough for gaps beyond a byte
    packed = sf.pack(kernel, groups)
    block = min(channel_block(kh, kw), icg)
    blocks, taps = -(-icg // block), block * kh * kw
    kept = {}
    for r, s, c, o in zip(*np.nonzero(kernel), strict=True):
        (b, c_in_block), (g, k) = divmod(int(c), block), divmod(int(o), ocg)
        kept[((g * blocks + b) * ocg + k) * taps + (c_in_block * kh + r) * kw + s] = kernel[r, s, c, o]
    assert np.array_equal(packed.values, [kept[p] for p in sorted(kept)])
    position, positions = 0, []
    for gap in packed.pattern.gaps.tolist():
        position += gap
        if gap != SKIP:
            positions.append(position)
            position += 1
    assert positions == sorted(kept) and SKIP in packed.pattern.gaps


def test_a_fully_connected_kernel_has_long_blocks():
    """Its stored order: blocks of 1024 inputs, of a block one output after the other."""
    kernel = normal_kernel(np.random.default_rng(0), (2500, 3), 0.01)
    packed = sf.pack(kernel)
    assert packed.shape == (1, 1, 2500, 3) and packed.pattern.block == DENSE_BLOCK == 1024
    assert same_bits(packed.unpack(), kernel[None, None])
    order = np.concatenate([kernel[first : first + 1024].T.reshape(-1) for first in (0, 1024, 2048)])
    assert np.array_equal(packed.values, order[order != 0])
    assert sf.pack(kernel[None, None]).pattern.block == channel_block(1, 1)


@pytest.mark.parametrize("density", [0.01, 0.1, 1.0])
def test_bytes_per_kept_weight(density):
    """Four of value, one of gap, and one for every 255 skipped: a gap is j * 255 long with probability q^j."""
    q = (1 - density) ** SKIP
    packed = sf.pack(normal_kernel(np.random.default_rng(1), (3, 3, 128, 128), density))
    assert packed.nbytes == 4 * packed.values.size + packed.pattern.gaps.size
    assert packed.nbytes / packed.nnz == pytest.approx(5 + q / (1 - q), rel=0.01)


@pytest.mark.parametrize("density", [0.0, 0.2])
def test_np_savez_round_trip(tmp_path, density):
    packed = sf.pack(normal_kernel(np.random.default_rng(2), (3, 3, 33, 10), density))
    np.savez(tmp_path / "kernel.npz", **packed.to_arrays())
    with np.load(tmp_path / "kernel.npz", allow_pickle=False) as arrays:
        loaded = sf.PackedKernel.from_arrays(arrays)
    assert loaded.pattern == packed.pattern and same_bits(loaded.values, packed.values)


def test_orbax_round_trip(tmp_path):
    packed = sf.pack(normal_kernel(np.random.default_rng(3), (3, 3, 33, 10), 0.2))
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "kernel", packed.to_arrays())
        checkpointer.wait_until_finished()
        loaded = sf.PackedKernel.from_arrays(checkpointer.restore(tmp_path / "kernel", packed.to_arrays()))
    assert loaded.pattern == packed.pattern and same_bits(loaded.values, packed.values)


@pytest.mark.parametrize("pack", [sf.pack, lambda kernel: pack_int8(kernel, Quantization(0.1, 3))], ids=["float32", "int8"])
def test_what_was_given_may_change_afterwards(pack):
    """On a CPU JAX keeps NumPy's memory where it lies at a multiple of 64 bytes."""
    packed = pack(normal_kernel(np.random.default_rng(7), (3, 3, 40, 64), 0.3))
    before = np.array(packed.unpack())
    arrays = {name: aligned(array) for name, array in packed.to_arrays().items()}
    again = type(packed).from_arrays(arrays)
    for array in arrays.values():
        array[...] = 1
    np.testing.assert_array_equal(again.unpack(), before)


def test_scales_that_were_given_may_change_afterwards():
    scale = aligned(np.full(64, 0.01, np.float32))
    packed = pack_int8(normal_kernel(np.random.default_rng(7), (3, 3, 40, 64), 0.3), Quantization(0.1, 3), scale=scale)
    scale[:] = 1
    np.testing.assert_array_equal(packed.scale, np.float32(0.01))


def aligned(array):
    """A copy that begins at a multiple of 64 bytes."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start:start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def test_a_pytree_of_values_with_a_static_pattern():
    kernel = normal_kernel(np.random.default_rng(4), (3, 3, 8, 6), 0.3)
    packed, again, other = sf.pack(kernel), sf.pack(2 * kernel), sf.pack(kernel[..., ::-1])
    ((path, leaf),) = jax.tree_util.tree_leaves_with_path(packed)
    assert jax.tree_util.keystr(path) == ".values" and leaf is packed.values
    assert jax.tree.structure(packed) == jax.tree.structure(again) != jax.tree.structure(other)
    assert hash(packed.pattern) == hash(again.pattern) and packed.pattern != other.pattern
    assert same_bits(jax.tree.map(lambda v: 2 * v, packed).unpack(), 2 * kernel)
    assert repr(packed) == f"PackedKernel(shape=(3, 3, 8, 6), groups=1, density={packed.density:.3f}, nbytes={packed.nbytes})"
    with pytest.raises(ValueError, match="read-only"):
        packed.pattern.gaps[0] += 1


def test_unpack_is_linear_in_the_values():
    packed = sf.pack(normal_kernel(np.random.default_rng(5), (2, 2, 5, 4), 0.5))
    gradient = jax.grad(lambda p: jnp.vdot(p.unpack(), jnp.arange(80, dtype=jnp.float32).reshape(packed.shape)))(packed)
    assert np.array_equal(gradient.values, packed.pattern.index)


KERNEL = np.ones((3, 3, 4, 6), np.float32)


@pytest.mark.parametrize(("call", "error", "match"), [
    (lambda: sf.pack(KERNEL[0]), ValueError, r"shape \(3, 4, 6\), wanted 4 dimensions .* or 2 .ic, oc. of"),
    (lambda: sf.pack(KERNEL.astype(np.float64)), TypeError, r"dtype float64, wanted float32: cast it"),
    (lambda: sf.pack(KERNEL[:, :, :0]), ValueError, r"shape \(3, 3, 0, 6\), wanted no empty dimension"),
    (lambda: sf.pack(KERNEL[..., :0]), ValueError, r"shape \(3, 3, 4, 0\), wanted no empty dimension"),
    (lambda: sf.pack(KERNEL, 4), ValueError, "feature_group_count=4 does not divide the kernel's 6 output channels"),
    (lambda: sf.pack(KERNEL, 0), ValueError, "feature_group_count=0 does not divide"),
    (lambda: sf.pack(np.where(np.arange(6) == 2, np.nan, KERNEL)), ValueError, "36 non-finite weights: training diverged"),
    (lambda: jax.jit(lambda k: sf.pack(k).values)(KERNEL), TypeError, "traced kernel: .*pack outside jit"),
])
def test_pack_refuses(call, error, match):
    with pytest.raises(error, match=match):
        call()


def edited(**edits):
    arrays = sf.pack(normal_kernel(np.random.default_rng(6), (3, 3, 20, 6), 0.3)).to_arrays()
    return {name: edits[name](a) if name in edits else a for name, a in arrays.items()}


def with_layout(**sizes):
    names = ("kh", "kw", "icg", "oc", "groups", "block")
    return edited(layout=lambda a: np.asarray([sizes.get(n, v) for n, v in zip(names, a.tolist(), strict=True)]))


@pytest.mark.parametrize(("arrays", "match"), [
    ({"values": np.zeros(3, np.float32)}, r"packed arrays lack \['gaps', 'layout'\]"),
    (edited(values=lambda a: a.astype(np.float64)), "should be float32 values.*got float64"),
    (edited(gaps=lambda a: a.astype(np.int32)), "uint8 gaps.*int32"),
    (edited(layout=lambda a: a[:5]), "6 integers of layout"),
    (edited(layout=lambda a: a + 0.5), "6 integers of layout"),
    (with_layout(groups=4), "layout .* is no kernel's"),
    (with_layout(kh=0), "layout .* is no kernel's"),
    (with_layout(block=21), "layout .* is no kernel's"),
    (with_layout(icg=1 << 62), "layout .* is no kernel's"),
    (with_layout(oc=3), r"points outside its kernel \(3, 3, 20, 3\).*damaged or was edited"),
    (with_layout(icg=19, block=16), r"points outside its kernel .*channel 19 of 19"),
    (edited(values=lambda a: a[:-1]), "values have shape .* the pattern keeps .*the file is cut"),
    (edited(gaps=lambda a: a[:-3]), "values have shape .* the pattern keeps"),
    (edited(gaps=lambda a: np.where(a == SKIP, a, 254).astype(np.uint8)), "points outside its kernel"),
    (edited(gaps=lambda a: np.concatenate([np.full(99, SKIP, np.uint8), a])), "points outside its kernel"),
])
def test_damaged_arrays_are_refused(arrays, match):
    with pytest.raises(ValueError, match=match):
        sf.PackedKernel.from_arrays(arrays)


def test_a_damaged_pattern_does_not_unpack():
    packed = sf.pack(KERNEL)
    gaps = packed.pattern.gaps + np.uint8(7)
    damaged = sf.PackedKernel(packed.values, Pattern(packed.shape, 1, packed.pattern.block, gaps))
    with pytest.raises(ValueError, match="points outside its kernel"):
        damaged.unpack()
