"""What the networks learn from: digits made here, CIFAR-10's published files, and images in folders."""

from experiments.data.cifar10 import cifar10 as cifar10
from experiments.data.dataset import Data as Data
from experiments.data.dataset import Dataset as Dataset
from experiments.data.dataset import batch_indices as batch_indices
from experiments.data.digits import CLASSES as CLASSES
from experiments.data.digits import cluttered_digits as cluttered_digits
from experiments.data.image_folder import image_folder as image_folder
