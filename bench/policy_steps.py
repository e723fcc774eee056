"""What a step of bernoulli takes beside its passes, at the shapes that it is for: drawing masks, and learning.

    python bench/policy_steps.py [--steps 5] [--threads 1]

The checkpoints are headers without contents (`plans.py`); nothing of them is computed. The CPU does both while no
layer is read or computed, so it adds to what the plan says.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import click
import torch
from plans import MODELS, write_headers

from streamprune.config import PruneConfig
from streamprune.figures import table
from streamprune.methods.bernoulli import make_space
from streamprune.methods.policy import Policy
from streamprune.methods.table import resolve_settings
from streamprune.pipeline.source import Source
from streamprune.planning.decision import goal, make_plan

NAMES = ("llama-2-7b", "llama-2-13b", "llama-3-70b")


def seconds(model: Path, steps: int) -> tuple[int, float, float]:
    """How many units there are, and the median seconds of drawing a step's masks and of learning from their losses."""
    config = PruneConfig(str(model), Path("unused"), "bernoulli", ratio=0.2, evaluate=False)
    with Source(str(model), scope="units").open() as sweeper:
        plan = make_plan(config, sweeper.skeleton)
        space = make_space(sweeper.skeleton, "units", plan.layers, goal(config, sweeper.skeleton, plan))
    generator = torch.Generator().manual_seed(0)
    start = space.shifted(torch.randn(len(space.costs), generator=generator, dtype=torch.float64))
    policy, took = Policy(space, start, resolve_settings("bernoulli", {}), 0, {}), []
    for step in range(steps + 1):
        begin, p = time.perf_counter(), policy.sampled_from
        masks = policy.draw(step)
        drawn = time.perf_counter()
        policy.learn(step, steps + 1, masks, (3 + torch.rand(len(masks), generator=generator)).tolist(), p)
        took.append((drawn - begin, time.perf_counter() - drawn))
    # The first finds the order that all keep.
    drawing, learning = (statistics.median(each) for each in zip(*took[1:], strict=True))
    return len(space.costs), drawing, learning


@click.command()
@click.option("--steps", type=click.IntRange(1), default=5, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
def main(steps: int, threads: int) -> None:
    """Measure, and print the table."""
    torch.set_num_threads(threads)
    rows = [["model", "units", "masks, s", "learning, s"]]
    for name in NAMES:
        with tempfile.TemporaryDirectory() as directory:
            write_headers(Path(directory) / name, MODELS[name])
            units, drawing, learning = seconds(Path(directory) / name, steps)
        rows.append([name, f"{units:,}", f"{drawing:.2f}", f"{learning:.2f}"])
    print(table(rows, markdown=True))


if __name__ == "__main__":
    main()
