"""What others have published, on ImageNet: numbers of their papers and repositories, none measured here."""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """A published result.

    Attributes:
      method: its name.
      source: authors, venue and year.
      network: trained on ImageNet.
      dense, pruned: top-1 accuracy in %, None if not published.
      density: kept / all weights of the layers named.
      speed: over what it was compared with, in words; None if no speed was published.
    """

    method: str
    source: str
    network: str
    dense: float | None
    pruned: float | None
    density: tuple[float, str]
    speed: str | None


PUBLISHED = (
    Published("DNS", "Guo et al., NeurIPS 2016", "AlexNet", None, None, (1 / 17.7, "all layers"), None),
    Published("GESL", "Park et al., ICLR 2017", "CaffeNet", 57.4, 57.48, (0.091, "conv2 to conv5, 0.07 to 0.14"),
              "convolutions 7.3x (Atom), 3.4x (Xeon), 3.1x (Xeon Phi) SGEMM"),
    Published("GESL", "Park et al., ICLR 2017; SkimCaffe", "GoogLeNet", 68.9, 68.66, (0.063, "3x3 and 5x5, 0.01 to 0.18"),
              None),
    Published("GESL", "SkimCaffe, 2017", "ResNet-50", None, 72.84, (0.028, "3x3, 0.02 to 0.19"), None),
    Published("sparse Winograd", "Li, Park and Tang, 2017", "AlexNet", None, None, (0.1, "Winograd domain, at most"),
              "convolutions 5.4x dense (Xeon), 0.1 % accuracy lost"),
    Published("Fast Sparse ConvNets", "Elsen et al., CVPR 2020", "MobileNetV1", None, 68.4, (0.1, "1x1"),
              "1.3x to 2.4x dense equivalents (Snapdragon 835)"),
    Published("STR", "Kusupati et al., ICML 2020", "ResNet-50", 77.0, 74.31, (0.0977, "all layers"), None),
    Published("RigL, ERK, 5x training", "Evci et al., ICML 2020", "ResNet-50", 76.8, 76.42, (0.1, "all layers"), None),
    Published("RigL, uniform, 5x training", "Evci et al., ICML 2020", "ResNet-50", 76.8, 75.73, (0.1, "all layers"), None),
    Published("WoodFisher", "Singh and Alistarh, NeurIPS 2020", "ResNet-50", 75.98, 75.20, (0.173, "all layers"), None),
    Published("GReg-1", "Wang et al., ICLR 2021", "ResNet-50", 76.13, 75.45, (0.173, "all layers"), None),
    Published("DeepSparse", "timings of SPDY, Frantar and Alistarh, ICML 2022", "ResNet-18", None, None, (0.095, "3x3"),
              "3x3 layers 1.9x to 6.1x its own dense ones"),
)
