"""What to remove: guides that say which weights a network can lose for speed, and optax transformations that remove them."""

from sparseflax.prune.allocate import guided as guided
from sparseflax.prune.fixed import fixed as fixed
from sparseflax.prune.guide import Guidance as Guidance
from sparseflax.prune.guide import LayerGuide as LayerGuide
from sparseflax.prune.guide import constant as constant
from sparseflax.prune.magnitude import magnitude as magnitude
from sparseflax.prune.mask import apply_masks as apply_masks
from sparseflax.prune.mask import densities as densities
from sparseflax.prune.mask import kernels as kernels
from sparseflax.prune.mask import masks as masks
from sparseflax.prune.ramp import ramp as ramp
from sparseflax.prune.wrap import wrap as wrap
