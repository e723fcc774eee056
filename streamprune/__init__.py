"""streamprune prunes language models that do not fit in memory by paging their layers through one device.

Importing it also lets transformers load checkpoints whose layers have different widths (`AutoModelForCausalLM`).
"""

from streamprune.config import PruneConfig
from streamprune.errors import StreampruneError
from streamprune.output import ragged
from streamprune.pipeline.progress import Progress
from streamprune.pipeline.run import PruneResult, prune

__all__ = ["Progress", "PruneConfig", "PruneResult", "StreampruneError", "prune"]

ragged.register()
