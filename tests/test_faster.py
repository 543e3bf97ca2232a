"""`faster`, from an ONNX file and a folder of pictures to a report, as small as it can be, and what it says to mistakes."""

import importlib.util
import json
import re
import shutil
import sys
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparseflax
from sparseflax import __main__ as commands
from sparseflax.cost.profile import save_machine
from sparseflax.job import faster as job
from sparseflax.job import layers, tries
from sparseflax.job import times as timing
from sparseflax.job.fidelity import Outputs, compare
from sparseflax.job.pictures import read_labels, read_pictures
from sparseflax.onnx import load_onnx
from sparseflax.prune import aim
from sparseflax.prune.mask import kernels
from sparseflax.prune.whole import Whole
from tests.machines import HERE

runtime = importlib.util.find_spec("onnxruntime")
onnx = pytest.importorskip("onnx")
pillow = pytest.importorskip("PIL.Image")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

CHANNELS, CLASSES, SIDE, COUNT = (3, 32, 48), 5, 8, 64


def write_network(path, *, shape=(1, 3, SIDE, SIDE), convolutions=True, seed=0):
    """Two convolutions, the first with its batch norm, a transposed one, and a classifier; or the classifier alone."""
    draw = np.random.default_rng(seed)
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
    if convolutions:
        weights |= {"w2": draw.standard_normal((last, last, 2, 4)) * last**-0.5, "b2": draw.standard_normal(last) / 9}
        nodes += [helper.make_node("ConvTranspose", [at, "w2", "b2"], ["up"], strides=[2, 2], pads=[0, 1, 0, 1], name="up")]
        at = "up"
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
        def predicted(model, x, machine, *, seconds, rounded):
            plan = sparseflax.plan(model, x, machine)
            return Whole(plan.dense_seconds, dense_scale=1.0)

        patch.setattr(job, "machine_of", lambda folder: HERE)
        patch.setattr(job, "measure", predicted)
        for module in (job, tries):
            patch.setattr(module, "afresh", lambda function, *args, **keywords: function(*args, **keywords))
        patch.setattr(aim, "MISSED", 1e9)  # any measured speed will do
        patch.setattr(timing, "BURST", 0.0)
        yield


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    network, pictures = write_network(folder / "network.onnx"), write_pictures(folder / "pictures")
    return network, pictures


@pytest.fixture(scope="module")
def finished(given, tmp_path_factory):
    out = tmp_path_factory.mktemp("job") / "out"
    return out, sparseflax.faster(*given, speedup=2, out=out, seconds=0.01)


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


def test_the_job_goes_on_where_it_stopped(given, finished, monkeypatch):
    out, result = finished
    monkeypatch.setattr(layers, "hessians", None)  # nothing is pruned again
    assert sparseflax.faster(*given, speedup=2, out=out, seconds=0.01) == json.loads(json.dumps(result))
    (out / "result.json").unlink()
    again = sparseflax.faster(*given, speedup=2, out=out, seconds=0.01)
    assert again["fidelity"] == result["fidelity"] and again["layers"] == result["layers"]


@pytest.mark.parametrize("wish", ["speedup", "milliseconds"])
@pytest.mark.parametrize("first", [4 / 3, 3 / 4], ids=["too slow", "too fast"])
def test_what_is_missed_is_aimed_at_again(given, monkeypatch, tmp_path, first, wish):
    """Measured off, then as asked; the network's measurement that led there is kept. A time is that, whatever dense takes."""
    network, pictures = given
    predicted = sparseflax.plan(load_onnx(network), np.ones((1, SIDE, SIDE, 3), np.float32), HERE).dense_seconds
    asked, wanted = ({"speedup": 2}, 1.0) if wish == "speedup" else ({"milliseconds": 500 * predicted}, predicted / 2)
    guides, seconds = [], iter((first * wanted, wanted))

    def guide(job_, speedup):
        found = original(job_, speedup)
        if speedup < 100:  # and not as much as there is
            guides.append((speedup, found))
        return found

    original = tries.guide_for
    monkeypatch.setattr(aim, "MISSED", 0.05)
    monkeypatch.setattr(tries, "guide_for", guide)
    monkeypatch.setattr(timing, "medians", lambda calls, *_: [2.0, 2.5, next(seconds), *[1.0] * (len(calls) - 3)])
    monkeypatch.setattr(timing, "engines", lambda *_: ({}, {}))
    with pytest.raises(StopIteration):  # the clock has no more to say once the network is made
        sparseflax.faster(network, pictures, **asked, out=tmp_path / "out", seconds=0.01)
    first_whole, kept = (json.loads((tmp_path / "out" / name).read_text()) for name in ("whole.json", "aimed.json"))
    dense = first_whole["dense_seconds"] * (1 + 2.0 / first / guides[0][1].speedup) / 2  # the first measurement counts as well
    assert kept == first_whole | {"dense_seconds": pytest.approx(dense)}
    (speed, missed), (_, met), (_, taken) = guides[:3]
    assert speed == pytest.approx(2) and (met.seconds < missed.seconds) == (first > 1) and taken.densities == met.densities


def test_what_was_measured_for_a_network_of_the_same_layers_is_taken_over(given, finished, monkeypatch, tmp_path):
    _, pictures = given
    again = write_network(tmp_path / "again.onnx", seed=1)
    with monkeypatch.context() as patch:
        for module, function in ((job, "measure"), (tries, "measured"), (tries, "aimed")):  # nothing is measured but the end
            patch.setattr(module, function, None)
        found = sparseflax.faster(again, pictures, speedup=2, out=tmp_path / "out", like=finished[0], seconds=0.01)
    kept = [json.loads((folder / "whole.json").read_text()) for folder in (finished[0], tmp_path / "out")]
    assert kept[0] == kept[1] and {row["path"]: row["density"] for row in found["layers"]} == {
        row["path"]: row["density"] for row in finished[1]["layers"]}
    assert found["pictures"]["notes"] == [*finished[1]["pictures"]["notes"], "What its layers take and what pruning them loses "
                                          f"was measured by the job in {finished[0]}."]
    pruned, before = (kernels(nnx.state(load_onnx(path), nnx.Param)) for path in (tmp_path / "out" / "pruned.onnx", again))
    for row in found["layers"]:  # the weights are its own, though
        kept_here = np.asarray(pruned[row["path"]]) != 0
        assert row["density"] == 1 or 0 < kept_here.mean() < 1
        assert np.corrcoef(pruned[row["path"]][kept_here], before[row["path"]][kept_here])[0, 1] > 0.5
    # asked for something else, it aims anew
    with monkeypatch.context() as patch:
        patch.setattr(job, "measure", None)
        patch.setattr(tries, "measured", None)
        sparseflax.faster(again, pictures, speedup=1.5, out=tmp_path / "slower", like=finished[0], seconds=0.01)
    with pytest.raises(ValueError, match=r"with layers '\w+' instead of '\w+', precision 'float32' instead of 'int8'"):
        sparseflax.faster(write_network(tmp_path / "other.onnx", shape=(1, 3, 16, 16)), pictures, speedup=2,
                          precision="int8", out=tmp_path / "int8", like=finished[0])
    with pytest.raises(ValueError, match="holds no job: wanted the folder of one for a network of the same layers"):
        sparseflax.faster(again, pictures, speedup=2, out=tmp_path / "none", like=tmp_path)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(finished[0], elsewhere)
    save_machine(elsewhere / "machine.json", replace(HERE, name="another CPU"))
    with pytest.raises(ValueError, match=r"was measured for another CPU .*, this is .*: leave it out, and it is measured"):
        sparseflax.faster(again, pictures, speedup=2, out=tmp_path / "here", like=elsewhere)
    assert not any((tmp_path / name).exists() for name in ("int8", "none", "here"))  # no folder is left of what is refused


def test_a_score_of_the_users_own(given, tmp_path):
    """It is asked of the dense network and of each that was tried, and is what the points are of."""
    scores = []

    def score(call):
        assert call(np.zeros((2, SIDE, SIDE, 3), np.float32)).shape == (2, CLASSES)
        scores.append(90.0 - 10 * len(scores))
        return scores[-1]

    found = sparseflax.faster(*given, points=25, score=score, out=tmp_path / "out", seconds=0.01)
    tried = {one["asked"]: one["points"] for one in found["curve"]}
    assert sorted(tried.values()) == [10.0 * i for i in range(1, len(tried) + 1)] and len(tried) == tries.CURVE + tries.FINER
    chosen = next(one for one in found["curve"] if one["chosen"])
    assert chosen["points"] <= 25 and chosen["asked"] == max(speed for speed, points in tried.items() if points <= 25)
    assert found["fidelity"]["measure"] == "score" and found["fidelity"]["original_score"] == 90
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Its score went from 90.00 % to" in page and f"{found['highest']['speedup']:.2f}x" in page


def test_in_eight_bits(given, monkeypatch, tmp_path):
    """Pruned by blocks of four, its ranges found by the pictures; written, read, and as close as its error says.

    A network of the same layers takes over what was measured for it.
    """
    network, pictures = given
    out = tmp_path / "out"
    found = sparseflax.faster(network, pictures, speedup=2, precision="int8", out=out, seconds=0.01)
    packed, plan = sparseflax.load(out / "network.safetensors", load_onnx(network))
    rounded = {row.path: row for row in plan.layers if row.inputs is not None}
    assert rounded and {row["path"] for row in found["layers"] if row["int8"]} == rounded.keys()
    said = f"{len(rounded)} of its {len(plan.layers)} layers in eight bits"
    page = (out / "report.html").read_text()
    assert said in page
    if runtime is not None:  # whose tool makes a file in eight bits of the dense network, by the same pictures
        assert 0 < found["coarser"]["onnxruntime int8"]["error"] < 0.1 and "dense, ONNX Runtime, int8" in page
    own = kernels(nnx.state(load_onnx(out / "pruned.onnx"), nnx.Param))
    pruned = [np.asarray(own[path]) for path, row in rounded.items() if row.density < 1]
    assert pruned
    for kernel in pruned:  # of 32 and 48 input channels
        blocks = (kernel.reshape(*kernel.shape[:-2], -1, 4, kernel.shape[-1]) != 0).sum(-2)
        assert set(np.unique(blocks)) == {0, 4}
    unseen = jnp.asarray(read_pictures(pictures, (SIDE, SIDE, 3)).share()[1].inputs(slice(None)))
    y, wanted = packed(unseen), load_onnx(network)(unseen)
    assert np.linalg.norm(y - wanted) / np.linalg.norm(wanted) == pytest.approx(found["fidelity"]["error"], rel=1e-3)
    for module, function in ((job, "measure"), (tries, "measured"), (tries, "aimed")):
        monkeypatch.setattr(module, function, None)
    again = sparseflax.faster(write_network(tmp_path / "again.onnx", seed=1), pictures, speedup=2, precision="int8",
                              out=tmp_path / "again", like=out, seconds=0.01)
    assert [[row[key] for key in ("path", "density")] for row in again["layers"]] == [
        [row[key] for key in ("path", "density")] for row in found["layers"]]


def test_the_report_needs_nothing_beside_it(finished):
    out, result = finished
    page = (out / "report.html").read_text()
    assert not re.search(r"(?:src|href)=['\"](?!data:)", page) and "data:image/png" in page
    assert all(said in page for said in (result["worst"]["name"], *(row["path"] for row in result["layers"])))
    assert runtime is None or result["seconds"]["onnxruntime"] > 0


def test_a_command_finetunes_and_keeps_to_points(given, monkeypatch, capsys, tmp_path):
    labels = tmp_path / "labels.csv"
    labels.write_text("".join(f"{i:02}.png,{i % CLASSES}\n" for i in range(COUNT)))
    network, pictures = map(str, given)
    arguments = ["faster", network, "--images", pictures, "--points", "100", "--finetune", "0.001", "--labels", str(labels)]
    monkeypatch.setattr(sys, "argv", ["sparseflax", *arguments, "--out", str(tmp_path / "out"), "--seconds", "0.01"])
    monkeypatch.setattr(tries, "CURVE", 2)
    commands.main()
    said = capsys.readouterr().out
    assert "Its accuracy went from" in said and "what can be had for what" in said
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [one["chosen"] for one in result["curve"]] == [False, True]  # the fastest
    assert all(one["seconds"] > 0 for one in result["curve"])
    assert "What can be had for what" in (tmp_path / "out" / "report.html").read_text()
    pruned = load_onnx(tmp_path / "out" / "pruned.onnx")
    found = {row.path: row.density for row in sparseflax.plan(pruned, np.ones((1, SIDE, SIDE, 3), np.float32), HERE).layers}
    assert found == {row["path"]: row["density"] for row in result["layers"]}  # zeros stayed zeros


def test_pictures_of_all_kinds(tmp_path):
    """Other sizes and modes are converted, and it is said; an open size is that of most pictures."""
    folder = write_pictures(tmp_path / "pictures", 9, side=70)
    (folder / "deep").mkdir()
    pillow.new("RGBA", (20, 10), (255, 0, 0, 128)).save(folder / "deep" / "red.png")
    pillow.fromarray(np.full((70, 70), 65535, np.uint16)).save(folder / "white.png")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture either")
    found = read_pictures(folder, (None, None, 3), mean=(0.5,), std=(0.25, 0.5, 1.0))
    assert found.pixels.shape == (11, 64, 64, 3) and found.pixels.dtype == np.uint8
    red, white = (found.inputs(found.names.index(name)) for name in ("deep/red.png", "white.png"))
    np.testing.assert_allclose(red[0, 0], (2, -1, -0.5), rtol=1e-6)
    np.testing.assert_allclose(white[0, 0], (2, 1, 0.5), rtol=1e-6)
    for said in ("11 pictures, as RGB", "11 of them resized to 64 x 64", "70 x 70 (10), 10 x 20 (1)",
                 "2 of them converted to RGB", "1 left out, as they cannot be read: broken.png", "Only 11 pictures"):
        assert any(said in note for note in found.notes), said
    grey = read_pictures(folder, (8, 8, 1))
    assert grey.pixels.shape == (11, 8, 8, 1) and grey.digest != found.digest
    seen, unseen = grey.share()
    assert (len(seen), len(unseen)) == (9, 2) and {*seen.names, *unseen.names} == {*found.names}


@pytest.mark.parametrize("shape, options, message", [
    ((4, 4, 4), {}, "with 4 channels, pictures have 1 (grey) or 3 (RGB)"),
    ((10,), {}, "takes inputs of shape (10,) with None channels"),
    ((4, 4, 3), {"size": (8, 8)}, "fixes its input to 4 x 4, the size asked for is 8 x 8"),
    ((4, 4, 3), {"mean": (0.5, 0.5)}, "mean is [0.5, 0.5], wanted one number or one for each of 3 channels"),
    ((4, 4, 3), {"std": (0.0,)}, "std is [0.0], wanted positive, one number")])
def test_pictures_that_a_network_cannot_take(tmp_path, shape, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_pictures(write_pictures(tmp_path / "pictures", 8), shape, **options)


def test_folders_without_enough_pictures(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        read_pictures(tmp_path / "missing", (4, 4, 3))
    folder = write_pictures(tmp_path / "pictures", 0)
    with pytest.raises(ValueError, match="holds no pictures .*wanted at least 8, better 50"):
        read_pictures(folder, (4, 4, 3))
    for i in range(8):
        (folder / f"{i}.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"only 0 can be read, wanted at least 8; not \d.png \(cannot identify"):
        read_pictures(folder, (4, 4, 3))


def test_labels(tmp_path):
    file = tmp_path / "labels.csv"
    file.write_text("a.png,3\n\nb.png, 0\n")
    np.testing.assert_array_equal(read_labels(file, ("b.png", "a.png")), [0, 3])
    with pytest.raises(ValueError, match="no label for 1 of 2 pictures, the first 'c.png'"):
        read_labels(file, ("a.png", "c.png"))
    file.write_text("a.png,cat\n")
    with pytest.raises(ValueError, match=r"line 1 of .* is 'a.png,cat', wanted picture,class, the class a number"):
        read_labels(file, ("a.png",))


def test_how_far_outputs_are_from_the_original():
    before = Outputs((np.array([[3.0, 4], [0, 5], [5, 0], [0, 5]]),))
    after = Outputs((np.array([[3.0, 4], [0, 5], [5, 0], [5, 0]]),))
    found = compare(after, before, np.array([1, 1, 1, 1]))
    np.testing.assert_allclose(found.error, 50**0.5 / 10)
    assert (found.agreement, found.accuracy, found.original_accuracy) == (0.75, 0.5, 0.75)
    np.testing.assert_allclose(found.errors, (0, 0, 0, 2**0.5))
    assert (found.points, found.measure) == (25, "accuracy")
    np.testing.assert_allclose(found.doubt, 100 * np.std([0, 0, 0, 1], ddof=1) / 4**0.5)  # one of four was right, and is not
    assert found.keeps_to(50.0) and not found.keeps_to(49.9)
    assert compare(after, before).doubt == found.doubt and compare(before, before).keeps_to(0)
    maps = Outputs((np.ones((2, 3, 3, 1)), np.ones((2, 4))))
    found = compare(maps._replace(arrays=(maps.arrays[0], 1.1 * maps.arrays[1])), maps)
    assert (found.agreement, found.measure) == (None, "relative error") and found.points == pytest.approx(10)
    with pytest.raises(ValueError, match="labels are classes, and outputs of shape .* are none"):
        compare(maps, maps, np.zeros(2))
    with pytest.raises(ValueError, match="labels up to 2 for outputs of shape .* wanted one class from 0 to 1"):
        compare(before, before, np.full(4, 2))


@pytest.mark.parametrize("options, message", [
    ({}, "speedup=None, milliseconds=None, points=None: wanted one of the first two, or points, or both"),
    ({"speedup": 2, "milliseconds": 1}, "speedup=2, milliseconds=1"),
    ({"speedup": 0.5}, "speedup=0.5, wanted at least 1"),
    ({"points": -1}, "wanted positive finite numbers, got {'points': -1}"),
    ({"speedup": 2, "precision": "int4"}, "precision='int4', wanted 'float32' or 'int8'"),
    ({"speedup": 2, "batch": 0}, "batch=0, finetune=0.0, wanted at least 1 image")])
def test_wishes_that_cannot_be(given, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sparseflax.faster(*given, **options)


def test_files_and_folders_that_will_not_do(given, finished, tmp_path):
    network, pictures = given
    (tmp_path / "text.onnx").write_text("no network")
    with pytest.raises(ValueError, match="no ONNX"):
        sparseflax.faster(tmp_path / "text.onnx", pictures, speedup=2)
    with pytest.raises(ValueError, match="has no 2-D convolution"):
        sparseflax.faster(write_network(tmp_path / "flat.onnx", convolutions=False), pictures, speedup=2)
    with pytest.raises(ValueError, match="holds a run with speedup 2 instead of 3: give another --out, or delete the folder"):
        sparseflax.faster(network, pictures, speedup=3, out=finished[0])
    with pytest.raises(ValueError, match="holds files, and none that says of which job: give another --out"):
        sparseflax.faster(network, pictures, speedup=2, out=tmp_path)
