"""Hashes of what small runs write and plan: held equal while the code is moved about.

    python bench/same_bytes.py --write FILE      before
    python bench/same_bytes.py --against FILE    after: prints what differs, and exits with 1 if anything does

Tiny random models of every family, every method with everything it can prune, every layout, repair, resumed runs. The
hashes are those of one machine and one torch: sums depend on both.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import transformers
from tiny_models import FAMILY_FIELDS, RAGGED, save_tiny

from streamprune import Progress, PruneConfig, prune
from streamprune.methods.table import METHODS
from streamprune.pipeline.run import foretell

SMALL: dict[str, Any] = {"samples": 5, "seq_len": 16, "micro_batch": 2}
QUICK: dict[str, dict[str, Any]] = {
    "smoothgrad": {"draws": 3},
    "moreau": {"steps": 2, "draws": 2},
    "moreau-gs": {"steps": 3, "eta_quantile": 0.3},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "defaults": {"samples": None, "seq_len": None, "micro_batch": None, "settings": {}, "method": "moreau-gs"},
    "stock": {"stock": True},
    "stock-all": {"layers": (0, 8)},
    "mistral": {"stock": True, "emit": "mistral"},
    "global": {"allocation": "global"},
    "global-raw": {"allocation": "global", "normalize": "raw", "min_keep": 0.3, "round_to": 4},
    "apart": {"attention_ratio": 0.4, "mlp_ratio": 0.5},
    "rounded": {"round_to": 8},
    "contiguous": {"granularity": "layers", "contiguous": True, "layers": (1, 7)},
    "sharded": {"max_shard_size": 60_000},
    "nothing": {"ratio": 0.0},
    "own": {"compensate": True, "compensate_tokens": 64, "compensate_target": "own"},
    "stream": {"compensate": True, "compensate_tokens": 64},
    "stream-ridge": {"compensate": True, "compensate_tokens": 256, "compensate_ridge": 0.5},
    "layers-repaired": {"granularity": "layers", "compensate": True, "compensate_tokens": 64},
    "flap-no-bias": {"method": "flap", "settings": {"bias": "no"}},
    "flap-repaired": {"method": "flap", "compensate": True, "compensate_tokens": 64, "settings": {"bias": "no"}},
    "compressed": {"method": "magnitude", "granularity": "2:4", "compress": True},
    "compressed-layers": {"method": "wanda", "granularity": "2:4", "compress": True, "layers": (2, 5)},
    "4:8": {"method": "wanda", "granularity": "4:8"},
    "weights-0.7": {"method": "sparsegpt", "granularity": "weights", "ratio": 0.7, "layers": (1, 4)},
    "bfloat16": {"dtype": "bfloat16"},
    "float64": {"dtype": "float64", "method": "moreau", "settings": {"steps": 2}},
    "narrow-state": {"method": "moreau", "settings": {"steps": 2}, "state_dtype": "bfloat16"},
    "scratch": {"method": "moreau", "settings": {"steps": 2}, "host_memory": None, "scratch": "scratch"},
    "first": {"sampling": "first"},
    "bos": {"bos": "always"},
    "never": {"bos": "never"},
    "seed": {"seed": 7, "method": "random"},
    "second": {"settings": {"order": "second"}},
    "mix": {"settings": {"order": "mix"}},
    "vectorize": {"settings": {"order": "vectorize"}},
    "score-mean": {"method": "smoothgrad", "settings": {"draws": 2, "mean": "score"}},
    "gblm-2": {"method": "gblm", "settings": {"p": 2, "norm": "published"}},
    "gblm-gradient": {"method": "gblm", "settings": {"terms": "gradient"}, "granularity": "weights"},
}
RESUMED = ("stock", "global", "own", "stream", "layers-repaired", "4:8", "weights-0.7", "narrow-state", "gblm-2")
OF_FAMILIES: dict[str, dict[str, Any]] = {
    "taylor": {"settings": {}},
    "stock": {"stock": True, "layers": None},
    "global": {"allocation": "global", "method": "flap"},
    "layers": {"granularity": "layers", "method": "block-influence", "ratio": 0.5},
    "weights": {"granularity": "weights", "method": "wanda"},
    "own": {"compensate": True, "compensate_tokens": 64, "compensate_target": "own"},
    "stream": {"compensate": True, "compensate_tokens": 64},
}
KILLED_AFTER = 7  # times that the run has advanced


class Killed(BaseException):
    """As if the process ended there."""


class Killing(Progress):
    """Progress that ends the run."""

    left = KILLED_AFTER

    def advance(self, nbytes: int, **facts: Any) -> None:
        """Count down."""
        self.left -= 1
        if self.left == 0:
            raise Killed


def runs(models: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, options) of every run, with the model's path in them."""
    llama = {"model": models / "llama", "layers": (2, 6), "method": "taylor", "evaluate": False} | SMALL
    for method, row in METHODS.items():
        for target in row.targets:
            for granularity in ("weights", "2:4") if target == "weights" else (target,):
                what = {"method": method, "settings": QUICK.get(method, {}), "granularity": granularity}
                yield f"{method}/{granularity}", llama | what
    for name, options in LAYOUTS.items():
        more = {"layers": None} if options.get("stock") or (options.get("compress") and "layers" not in options) else {}
        yield f"layout/{name}", llama | more | options
    for name in RESUMED:
        more = {"layers": None} if LAYOUTS[name].get("stock") else {}
        yield f"resumed/{name}", llama | more | LAYOUTS[name] | {"resume": True}
    for family in FAMILY_FIELDS:
        base = {"model": models / family, "layers": (1, 3), "method": "taylor", "evaluate": False} | SMALL
        for name, options in OF_FAMILIES.items():
            ragged = family in RAGGED
            if name == "global" and not ragged:
                continue
            one_width = {} if ragged or "granularity" in options else {"stock": True, "layers": None}
            yield f"{family}/{name}", base | one_width | options


def written(options: dict[str, Any], scratch: Path) -> dict[str, str]:
    """SHA-256 of each file that the run writes, and of what streamprune.json says of the result; or the refusal."""
    output = scratch / "output"
    if options.get("scratch"):
        options = options | {"scratch": scratch / "scratch"}
    config = PruneConfig(**{name: value for name, value in options.items() if value is not None}, output=output)
    if config.resume:
        try:
            prune(config, Killing(quiet=True))
        except Killed:
            pass
        else:
            raise SystemExit("the run ended before it was killed")
    try:
        facts = prune(config).facts
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}".replace(str(scratch), "")}
    said = {name: facts[name] for name in ("kept", "layout", "layers", "zeros", "parameters", "bytes") if name in facts}
    found = {
        str(file.relative_to(output)): hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        for file in sorted(output.rglob("*"))
        if file.is_file() and file.name not in ("README.md", "streamprune.json")
    }
    return found | {"facts": hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]}


def planned(options: dict[str, Any], scratch: Path) -> list[Any]:
    """Numbers of every stage on a card: bytes held, moved, read and written, FLOPs."""
    given = {name: value for name, value in options.items() if value is not None}
    try:
        placement = foretell(PruneConfig(**given, output=scratch / "planned"), assume="h100").placement
    except Exception as error:
        return [f"{type(error).__name__}: {error}".replace(str(scratch), "")]
    numbers = []
    for stage in placement.stages:
        work = [stage.forward, stage.backward, stage.noise, stage.factors, stage.updates]
        passes = [[order[0], order[-1]] if order else [] for order in stage.passes]
        held = [sum(stage.device.values()), sum(stage.host.values()), stage.scratch, stage.moved, stage.up, stage.down]
        numbers.append([stage.name, *held, stage.read, stage.written, stage.carried, *work, passes])
    return [placement.held.slots, placement.place, placement.state, placement.micro_batch, numbers]


def matrix() -> dict[str, Any]:
    """All of it, by the names of the runs."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        models = Path(directory) / "models"
        for family in FAMILY_FIELDS:
            save_tiny(models / family, family)
        save_tiny(models / "llama", "llama", num_hidden_layers=8, intermediate_size=40, head_dim=8)
        for number, (name, options) in enumerate(runs(models)):
            options = options | {"model": str(options["model"])}
            scratch = Path(directory) / str(number)
            scratch.mkdir()
            found[name] = {"written": written(options, scratch), "planned": planned(options, scratch)}
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    # Where the models lie is not what is compared.
    return json.loads(json.dumps(found).replace(directory, ""))


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--against", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.disable_progress_bar()
    found = matrix()
    if arguments.write:
        rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in found.items())
        arguments.write.write_text(f"{{\n{rows}\n}}\n")
    if arguments.against:
        before = json.loads(arguments.against.read_text())
        differ = [name for name in before.keys() | found.keys() if before.get(name) != found.get(name)]
        for name in sorted(differ):
            for what in ("written", "planned"):
                old, new = (each.get(name, {}).get(what) for each in (before, found))
                if old != new:
                    print(f"{name} {what}:\n  before {old}\n  after  {new}")
        print(f"{len(before)} runs before, {len(found)} after, {len(differ)} differ")
        sys.exit(bool(differ))


if __name__ == "__main__":
    main()
