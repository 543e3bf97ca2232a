"""The published networks, narrow, and of images as small as their strides allow: {name: (make, size of the image)}."""

from functools import partial

from experiments.models import VGG16, AlexNet, GoogLeNet, MobileNetV1, SqueezeNet, UNet, resnet18, resnet50

NARROW = {
    "alexnet": (partial(AlexNet, 10, 1 / 8, 99), 99),
    "vgg16": (partial(VGG16, 10, 1 / 16, 32), 32),
    "googlenet": (partial(GoogLeNet, 10, 1 / 16), 64),
    "resnet18": (partial(resnet18, 10, 1 / 16), 64),
    "resnet50": (partial(resnet50, 10, 1 / 16), 64),
    "mobilenet": (partial(MobileNetV1, 10, 1 / 16), 64),
    "squeezenet": (partial(SqueezeNet, 10, 1 / 8), 64),
    "unet": (partial(UNet, 10, 1 / 8), 32),
}
