"""The networks, as ordinary Flax modules: nothing here knows about sparsity.

`VGG` and `ResNet` are small, for digits. The others are the published networks for ImageNet, with their usual names of
layers, so that their usual weights fit (experiments/weights.py).
"""

from experiments.models.alexnet import AlexNet as AlexNet
from experiments.models.digits import VGG as VGG
from experiments.models.digits import InceptionNet as InceptionNet
from experiments.models.digits import ResNet as ResNet
from experiments.models.digits import max_pool as max_pool
from experiments.models.googlenet import GoogLeNet as GoogLeNet
from experiments.models.mobilenet import MobileNetV1 as MobileNetV1
from experiments.models.resnet import resnet18 as resnet18
from experiments.models.resnet import resnet50 as resnet50
from experiments.models.squeezenet import SqueezeNet as SqueezeNet
from experiments.models.unet import UNet as UNet
from experiments.models.vgg import VGG16 as VGG16
