"""streamprune prunes language models that do not fit in memory by paging their layers through one device.

Importing it also lets transformers load checkpoints whose layers have different widths (`AutoModelForCausalLM`).
"""

from streamprune import ragged
from streamprune.config import PruneConfig
from streamprune.errors import StreampruneError
from streamprune.progress import Progress
from streamprune.run import PruneResult, prune

__all__ = ["Progress", "PruneConfig", "PruneResult", "StreampruneError", "prune"]

ragged.register()
