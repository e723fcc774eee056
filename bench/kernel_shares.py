"""What part of a run our kernels take: by the virtual clock for each method, or measured on a GPU.

    python bench/kernel_shares.py [--model llama-2-7b ...] [--card h100 ...] [--method taylor ...] [--json FILE]
    python bench/kernel_shares.py --gpu --checkpoint DIR [--method taylor ...]

By the clock each start of a kernel takes its bytes or FLOPs over the card's rates, divided by the part of them that it
reached on an H100 (results/kernels-h100.json). A run is scoring from the page cache, by the clock, and writing to an
NVMe drive, by the plan; from a cold disk it takes longer, and the kernels' part is less. With --gpu torch's profiler
adds up what they take of a run on DIR.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import click
import virtual_clock
from clock_costs import kernel_seconds
from clock_rates import Machine, machine_of
from clocked import score
from plans import MODELS, write_headers
from virtual_time import replaced

from streamprune import PruneConfig, prune
from streamprune.errors import StreampruneError
from streamprune.figures import table
from streamprune.kernels.launch import Launch
from streamprune.methods.table import METHODS
from streamprune.planning import rates
from streamprune.planning.cards import CARDS

MOST = 0.03  # of a run that all kernels together may take, but for `grad_norm`
MEASURED = Path(__file__).parent / "results" / "kernels-h100.json"
TOKENS = 65536  # computed at once: more of them, fewer operations
# Method, and what else is asked for; the patterns that have kernels of their own.
RUNS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("magnitude", {}),
    ("magnitude", {"granularity": "weights"}),
    ("magnitude", {"granularity": "2:4"}),
    ("taylor", {}),
    ("taylor", {"granularity": "weights"}),
    ("smoothgrad", {"settings": {"draws": 20}}),  # of 100, each as any other
    ("moreau", {}),
    ("moreau-gs", {}),
    ("moreau-gs", {"granularity": "weights"}),
    ("wanda", {}),
    ("wanda", {"granularity": "weights"}),
    ("wanda", {"granularity": "4:8"}),
    ("flap", {}),
    ("gblm", {}),
    ("gblm", {"granularity": "2:4"}),
    ("sparsegpt", {"granularity": "weights"}),
    ("sparsegpt", {"granularity": "2:4"}),
)


def case_of(launch: Launch) -> str:
    """Name of the case of bench/kernel_cases.py that a start is one of."""
    name, given = launch.kernel.__name__, launch.constants
    lines = "columns" if "column" in name else "rows"
    if name == "perturb_kernel":
        return "perturb" if given["HAS_DELTA"] else "perturb, no δ"
    if name.startswith("moreau"):
        first = "" if given["HAS_DELTA"] else ", δ = 0"
        return f"moreau_step, GST {lines}{first}" if given.get("SHRINK", True) else "moreau_step"
    if name.endswith("_score_kernel"):
        return f"unit_score {given['FORM']}, {lines}"
    if name == "prune_n_of_m_kernel":
        return f"prune_n_of_m {'2:4' if given['M'] == 4 else '4:8'}"
    return name.removesuffix("_kernel")


def seconds_of(launch: Launch, machine: Machine, reached: Mapping[str, float]) -> float:
    """Seconds of a start; `reached` are parts of a copy's rate, by case. grad_norm's is in the machine's own rate."""
    taken = kernel_seconds(launch, machine)
    return taken if launch.kernel.__name__ == "grad_norm_kernel" else taken / reached.get(case_of(launch), 1.0)


@contextmanager
def noting(machine: Machine) -> Iterator[dict[str, float]]:
    """Give the seconds of each kernel that the clock starts inside the block, by its name."""
    reached = {figure["kernel"]: figure["share"] for figure in json.loads(MEASURED.read_text())}
    taken: dict[str, float] = defaultdict(float)

    def noted(launch: Launch, machine: Machine) -> float:
        seconds = seconds_of(launch, machine, reached)
        taken[launch.kernel.__name__.removesuffix("_kernel")] += seconds
        return seconds

    with replaced(virtual_clock.__name__, kernel_seconds=(kernel_seconds, noted)):
        yield taken


@dataclass(frozen=True)
class Shares:
    """Seconds of a run: of its scoring, of all of it, and of each kernel."""

    scoring: float
    run: float
    kernels: Mapping[str, float]

    @property
    def cells(self) -> list[str]:
        """Seconds, the kernels' parts but for grad_norm, grad_norm's, whether that is what is wanted, the largest."""
        kernels = dict(self.kernels)
        norms = kernels.pop("grad_norm", 0.0)
        total = sum(kernels.values())
        largest = [(name, taken / self.run) for name, taken in sorted(kernels.items(), key=lambda each: -each[1])[:2]]
        return [
            *(f"{seconds:.1f}" for seconds in (self.scoring, self.run)),
            *(f"{part:.1%}" for part in (total / self.scoring, total / self.run, norms / self.run)),
            "met" if total <= MOST * self.run else "MISSED",
            ", ".join(f"{name} {part:.1%}" for name, part in largest if part >= 0.0005) or "-",
        ]


def by_the_clock(path: Path, card: str, method: str, options: Mapping[str, Any]) -> Shares:
    """Shares on a card that is not there."""
    machine, given = machine_of(card), {"gpu_memory": CARDS[card].gib << 30, "warm": True, **options}
    with noting(machine) as taken:
        found = score(path, machine, method, at_once=max(1, TOKENS // METHODS[method].calibration[1]), **given)
    (writing,) = (stage for stage in found.placement.stages if stage.name == "writing")
    return Shares(found.seconds, found.seconds + rates.seconds(writing, rates.assumed(card)), taken)


def measured(checkpoint: Path, method: str, options: Mapping[str, Any]) -> Shares:
    """Shares on the GPU that is here, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with tempfile.TemporaryDirectory() as scratch, profile(activities=[ProfilerActivity.CUDA]) as profiled:
        facts = prune(PruneConfig(str(checkpoint), Path(scratch) / "out", method, evaluate=False, **options)).facts
    on_device = {each.key: each.self_device_time_total for each in profiled.key_averages()}
    return Shares(facts["seconds"]["scoring"], facts["seconds"]["total"], ours(on_device))


def ours(microseconds: Mapping[str, float]) -> dict[str, float]:
    """Pick the seconds of our kernels out of all that a profile saw; Triton names them after their functions."""
    names = ("perturb", "moreau_rows", "moreau_columns", "row_score", "column_score")
    names += ("grad_norm", "gram", "prune_rows", "prune_n_of_m", "obs_block")
    return {name: microseconds[f"{name}_kernel"] / 1e6 for name in names if f"{name}_kernel" in microseconds}


@click.command()
@click.option("--model", "models", type=click.Choice(list(MODELS)), multiple=True, default=tuple(MODELS)[:2])
@click.option("--card", "cards", type=click.Choice(list(CARDS)), multiple=True, default=("h100", "rtx4090"))
@click.option("--method", "methods", type=click.Choice(list(METHODS)), multiple=True)
@click.option("--gpu", is_flag=True, help="Measure on the GPU that is here, on --checkpoint.")
@click.option("--checkpoint", type=click.Path(path_type=Path, exists=True), help="Model directory, for --gpu.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the figures here.")
def main(
    models: Sequence[str],
    cards: Sequence[str],
    methods: Sequence[str],
    gpu: bool,
    checkpoint: Path | None,
    json_file: Path | None,
) -> None:
    """Run, print the table, and write JSON."""
    if gpu != (checkpoint is not None):
        raise click.UsageError("--gpu and --checkpoint go together")
    head = ["model", "card", "method", "what goes"]
    rows = [[*head, "scoring, s", "run, s", "of scoring", "of the run", "grad_norm", f"≤ {MOST:.0%}", "most of it"]]
    figures: list[dict[str, Any]] = []
    runs = [(method, options) for method, options in RUNS if not methods or method in methods]
    with tempfile.TemporaryDirectory() as directory:
        for model in () if checkpoint else models:
            write_headers(Path(directory) / model, MODELS[model])
        places = [(checkpoint.name, "this GPU")] if checkpoint else list(product(models, cards))
        for (model, card), (method, options) in product(places, runs):
            try:
                if checkpoint is None:
                    found = by_the_clock(Path(directory) / model, card, method, options)
                else:
                    found = measured(checkpoint, method, options)
            except StreampruneError as error:
                click.echo(f"{model} {card} {method}: {error}", err=True)
                continue
            said = [model, card, method, options.get("granularity", "units")]
            rows.append([*said, *found.cells])
            click.echo(" ".join(rows[-1]), err=True)
            figures.append(dict(zip(head, said, strict=True)) | vars(found))
    print(table(rows, markdown=True))
    if json_file:
        json_file.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
