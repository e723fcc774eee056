"""The element-wise operations of streamprune, each file a torch reference tuned for CPU.

Nothing here knows of models, files or methods; only torch is imported.
"""

from streamprune.kernels.moreau_step import line_norms, moreau_step, soft_threshold
from streamprune.kernels.perturb import noise_seed, perturb
from streamprune.kernels.unit_score import FORMS, unit_score

__all__ = ["FORMS", "line_norms", "moreau_step", "noise_seed", "perturb", "soft_threshold", "unit_score"]
