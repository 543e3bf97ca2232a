"""What to remove: guides that say which weights a network can lose for speed, and optax transformations that remove them."""

from sparseflax.prune.acdc import acdc as acdc
from sparseflax.prune.allocate import guided as guided
from sparseflax.prune.budget import budget as budget
from sparseflax.prune.fixed import fixed as fixed
from sparseflax.prune.guide import Guidance as Guidance
from sparseflax.prune.guide import LayerGuide as LayerGuide
from sparseflax.prune.guide import constant as constant
from sparseflax.prune.lasso import lasso as lasso
from sparseflax.prune.magnitude import magnitude as magnitude
from sparseflax.prune.mask import apply_masks as apply_masks
from sparseflax.prune.mask import densities as densities
from sparseflax.prune.mask import kernels as kernels
from sparseflax.prune.mask import masks as masks
from sparseflax.prune.measure import measure as measure
from sparseflax.prune.obs import obs as obs
from sparseflax.prune.one_shot import one_shot as one_shot
from sparseflax.prune.ramp import ramp as ramp
from sparseflax.prune.recalibrate import recalibrate as recalibrate
from sparseflax.prune.rigl import rigl as rigl
from sparseflax.prune.soft_threshold import soft_threshold as soft_threshold
from sparseflax.prune.surgery import surgery as surgery
from sparseflax.prune.unguided import erk as erk
from sparseflax.prune.unguided import global_magnitude as global_magnitude
from sparseflax.prune.unguided import uniform as uniform
from sparseflax.prune.whole import Whole as Whole
from sparseflax.prune.wrap import wrap as wrap
