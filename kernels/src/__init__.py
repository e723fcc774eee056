"""Element-wise and per-sample operations over whole weights, and products over tokens: in each file a torch reference
tuned for CPU, a kernel of Triton or the GPU's library, and the function that picks one of them by the device.

Nothing here knows of models, files or methods; only torch and, where it is installed, Triton are imported.
"""

from streamprune.kernels.add_product import add_product, sums_halves
from streamprune.kernels.grad_norm import grad_norm
from streamprune.kernels.gram import gram, mirror
from streamprune.kernels.moreau_step import MoreauStep, moreau_step, soft_threshold
from streamprune.kernels.obs_block import obs_block
from streamprune.kernels.perturb import noise_seed, perturb
from streamprune.kernels.unit_score import unit_score
from streamprune.kernels.weight_score import prune_n_of_m, prune_rows, weight_score

__all__ = [
    "MoreauStep",
    "add_product",
    "grad_norm",
    "gram",
    "mirror",
    "moreau_step",
    "noise_seed",
    "obs_block",
    "perturb",
    "prune_n_of_m",
    "prune_rows",
    "soft_threshold",
    "sums_halves",
    "unit_score",
    "weight_score",
]
