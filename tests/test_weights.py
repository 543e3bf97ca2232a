"""Weights from outside: PyTorch's own layers compute the same with the weights that were loaded, and what is refused."""

from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.models import VGG16, AlexNet, GoogLeNet, MobileNetV1, SqueezeNet, resnet18
from experiments.weights import load_weights, put
from sparseflax.files import safetensors

torch = pytest.importorskip("torch")



class TorchVGG(torch.nn.Module):
    """VGG-16 with torchvision's numbering of layers, 1/16 as wide, for 64x64 images and 10 classes."""

    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for widths in ((8, 8), (8, 8), (16, 16, 16), (32, 32, 32), (32, 32, 32)):
            for width in widths:
                layers += [torch.nn.Conv2d(channels, width, 3, padding=1), torch.nn.ReLU()]
                channels = width
            layers.append(torch.nn.MaxPool2d(2))
        self.features = torch.nn.Sequential(*layers)
        self.classifier = torch.nn.Sequential(
            torch.nn.Linear(4 * 32, 256), torch.nn.ReLU(), torch.nn.Dropout(), torch.nn.Linear(256, 256), torch.nn.ReLU(),
            torch.nn.Dropout(), torch.nn.Linear(256, 10))

    def forward(self, x):
        return self.classifier(torch.flatten(self.features(x), 1))


class TorchBlock(torch.nn.Module):
    """torchvision's BasicBlock."""

    def __init__(self, channels, width, stride):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(width)
        self.conv2 = torch.nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(width)
        self.downsample = torch.nn.Sequential() if (channels, stride) == (width, 1) else torch.nn.Sequential(
            torch.nn.Conv2d(channels, width, 1, stride, bias=False), torch.nn.BatchNorm2d(width))

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(self.downsample(x) + y)


class TorchResNet(torch.nn.Module):
    """ResNet-18 with torchvision's names, 1/8 as wide, for 10 classes."""

    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(8)
        channels = 8
        for index, width in enumerate((8, 16, 32, 64)):
            blocks = []
            for position in range(2):
                blocks.append(TorchBlock(channels, width, 2 if index and not position else 1))
                channels = width
            setattr(self, f"layer{index + 1}", torch.nn.Sequential(*blocks))
        self.fc = torch.nn.Linear(64, 10)

    def forward(self, x):
        x = torch.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


class TorchAlexNet(torch.nn.Module):
    """CaffeNet with Caffe's names, 1/16 as wide, for 131x131 images and 10 classes."""

    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 8, 11, 4)
        self.conv2 = torch.nn.Conv2d(8, 16, 5, padding=2, groups=2)
        self.conv3 = torch.nn.Conv2d(16, 24, 3, padding=1)
        self.conv4 = torch.nn.Conv2d(24, 24, 3, padding=1, groups=2)
        self.conv5 = torch.nn.Conv2d(24, 16, 3, padding=1, groups=2)
        self.fc6, self.fc7, self.fc8 = torch.nn.Linear(16 * 9, 256), torch.nn.Linear(256, 256), torch.nn.Linear(256, 10)
        self.norm = torch.nn.LocalResponseNorm(5)

    def forward(self, x):
        x = self.norm(torch.max_pool2d(torch.relu(self.conv1(x)), 3, 2))
        x = self.norm(torch.max_pool2d(torch.relu(self.conv2(x)), 3, 2))
        x = torch.relu(self.conv5(torch.relu(self.conv4(torch.relu(self.conv3(x))))))
        x = torch.flatten(torch.max_pool2d(x, 3, 2), 1)
        return self.fc8(torch.relu(self.fc7(torch.relu(self.fc6(x)))))


NETWORKS = {
    "vgg16": (TorchVGG, partial(VGG16, 10, 1 / 16, 64), 64),
    "resnet18": (TorchResNet, partial(resnet18, 10, 1 / 8), 64),
    "alexnet": (TorchAlexNet, partial(AlexNet, 10, 1 / 16, 131), 131),
}


def theirs(make):
    """A network of PyTorch in evaluation mode, with weights and statistics that are not the initial ones."""
    torch.manual_seed(0)
    network = make().eval()
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.ndim > 1:  # He's, so that the last layer still sees the image
                tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5)
            elif tensor.ndim == 1:
                tensor.uniform_(0.5, 1.5) if "var" in name or "weight" in name else tensor.normal_(0, 0.1)
    return network


@pytest.mark.parametrize("name, kind", [*((name, "torch") for name in NETWORKS), ("resnet18", "checkpoint"),
                                        ("resnet18", "safetensors")])
def test_loaded_networks_compute_what_pytorch_does(name, kind, tmp_path):
    make, ours, size = NETWORKS[name]
    network = theirs(make)
    state = network.state_dict()
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    if kind == "safetensors":
        path.write_bytes(safetensors.dump({name: tensor.numpy() for name, tensor in state.items()}, {}))
    else:
        torch.save(state if kind == "torch" else {"state_dict": state, "epoch": 90}, path)
    model = nnx.eval_shape(lambda: ours(rngs=nnx.Rngs(0)))
    model.eval()
    load_weights(model, path)
    x = np.random.default_rng(0).standard_normal((2, size, size, 3)).astype(np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    # As in test_onnx.py: the fan-ins of all layers sum up to less than 10,000 terms.
    tolerance = 2 * 8 * 10_000**0.5 * 2.0**-24 * np.abs(expected).max()
    assert expected.std(axis=0).max() > 10 * tolerance
    np.testing.assert_allclose(jax.jit(lambda m, x: m(x))(model, x), expected, rtol=0, atol=tolerance)


def small_alexnet():
    return nnx.eval_shape(lambda: AlexNet(10, 1 / 16, 99, rngs=nnx.Rngs(0)))


def torch_names(model):
    """Names and shapes of a model's weights in PyTorch."""
    state, tensors = nnx.to_flat_state(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))), {}
    words = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    for keys, variable in state:
        value = np.zeros(variable.shape, np.float32)
        value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        tensors[".".join([*map(str, keys[:-1]), words.get(keys[-1], keys[-1])])] = value
    return tensors


def test_names_are_torchvisions():
    google = torch_names(nnx.eval_shape(lambda: GoogLeNet(batch_norm=True, rngs=nnx.Rngs(0))))
    assert google["inception4b.branch2.1.conv.weight"].shape == (224, 112, 3, 3)
    assert google["inception5b.branch4.1.bn.running_var"].shape == (128,)
    assert google["conv1.conv.weight"].shape == (64, 3, 7, 7)
    mobile = torch_names(nnx.eval_shape(lambda: MobileNetV1(rngs=nnx.Rngs(0))))
    assert mobile["blocks.3.5.conv_dw.weight"].shape == (512, 1, 3, 3)
    squeeze = torch_names(nnx.eval_shape(lambda: SqueezeNet(rngs=nnx.Rngs(0))))
    assert squeeze["features.12.expand3x3.weight"].shape == (256, 64, 3, 3)
    assert squeeze["classifier.1.weight"].shape == (1000, 512, 1, 1)


def test_all_that_is_wrong_is_named_and_nothing_changes():
    model = small_alexnet()
    tensors = torch_names(model)
    put(model, tensors)
    tensors["conv1.bias"] = np.ones(8, np.float32)
    tensors |= {"conv9.weight": np.zeros(3, np.float32), "conv2.bias": np.zeros(17, np.float32),
                "conv3.bias": np.zeros(24, np.int64)}
    del tensors["fc7.weight"]
    with pytest.raises(ValueError) as error:
        put(model, tensors)
    for part in ("fc7.weight is missing", "conv9.weight is superfluous", "conv2.bias has shape (17,), wanted (16,)",
                 "conv3.bias is int64, wanted float32"):
        assert part in str(error.value)
    assert not np.any(model.conv1.bias[...])


def test_counts_and_auxiliary_classifiers_are_passed_over():
    model = small_alexnet()
    tensors = torch_names(model) | {"bn1.num_batches_tracked": np.array(3), "aux1.fc1.weight": np.zeros((3, 3), np.float32)}
    put(model, tensors)
    assert not np.any(model.fc6.kernel[...])


def test_damaged_files(tmp_path, monkeypatch):
    model = small_alexnet()
    with pytest.raises(FileNotFoundError):
        load_weights(model, tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError):
        load_weights(model, tmp_path / "none.safetensors")
    (tmp_path / "m.pth").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="no state dict that can be read without running code"):
        load_weights(model, tmp_path / "m.pth")
    (tmp_path / "m.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="no safetensors file, or a cut one"):
        load_weights(model, tmp_path / "m.safetensors")
    torch.save({"epoch": 3}, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"wanted names and tensors, found \['epoch'\]"):
        load_weights(model, tmp_path / "m.pth")
    torch.save({"conv1.bias": torch.zeros(8)}, tmp_path / "m.pth")
    with pytest.raises(ValueError, match="m.pth does not fit the AlexNet: conv1.weight is missing; "):
        load_weights(model, tmp_path / "m.pth")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(ImportError, match="pip install torch"):
        load_weights(model, tmp_path / "m.pth")
