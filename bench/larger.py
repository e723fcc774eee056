"""A model larger than memory: the command line on a Llama-2-13B of random weights, held to 6 GiB.

    python bench/larger.py --scratch DIR [--layers 40] [--memory 6GiB] [--gpu-memory SIZE] [--json FILE]

Writes the checkpoint (26 GB at 40 layers, in DIR, removed afterwards), drops it from the page cache, and runs
`streamprune --method moreau-gs --set steps=1 --samples 10 --seq-len 128 --ratio 0.2 --no-evaluate` on it, with
--host-memory and --scratch, in a process that is killed if it holds more than --memory: by a cgroup v2 where the system
lets one be made, else by looking at its VmRSS every 50 ms. With --gpu-memory it computes on a GPU, within that budget.
Afterwards widths, shapes, and values of some tensors of the output are compared with the source. Where DIR has no room
for checkpoint and output, as many layers are taken as it has room for, and the table says so.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

SAMPLES, SEQ_LEN, RATIO = 10, 128, 0.2
POLL_SECONDS = 0.05
SHOWN_SECONDS = 30.0  # between lines of progress
SHARD_BYTES = 2_000_000_000
SPARE_BYTES = 2_000_000_000  # hidden states on --scratch, and what the estimate leaves out
COMPARED = {True: 14, False: 6}  # tensors whose values are looked at: such that lost units, and others
BYTES = 2  # of a bfloat16
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
COMMAND = [sys.executable, "-m", "streamprune"]
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "head_dim": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}
DRY = {"hidden_size": 320, "intermediate_size": 864, "num_attention_heads": 10, "num_key_value_heads": 10}
DRY |= {"head_dim": 32, "vocab_size": 1024}
# What a unit cuts: its kind, and the dimension along which it lies.
CUT = {name: ("kv_group", 0) for name in ("q_proj", "k_proj", "v_proj")} | {"o_proj": ("kv_group", 1)}
CUT |= {"gate_proj": ("channel", 0), "up_proj": ("channel", 0), "down_proj": ("channel", 1)}


class Wrong(Exception):
    """The output is not what the source and its kept units make it."""


def byte_size(context: click.Context, parameter: click.Parameter, text: str | None) -> int | None:
    """6GiB, 6GB or a number of bytes."""
    if text is None:
        return None
    number = text.rstrip("KMGiBkmgb")
    try:
        return int(float(number) * UNITS[text[len(number) :].upper()]) if number != text else int(text)
    except (KeyError, ValueError):
        raise click.BadParameter(f"{text!r} is not a size such as 6GiB") from None


def needed_bytes(config: Mapping[str, Any], layers: int) -> tuple[int, int]:
    """(checkpoint, disk for it, the pruned output and what else there is) of a model of so many layers."""
    hidden = config["hidden_size"]
    layer = BYTES * (4 * hidden**2 + 3 * hidden * config["intermediate_size"] + 2 * hidden)
    checkpoint = BYTES * (2 * config["vocab_size"] + 1) * hidden + layers * layer
    return checkpoint, 2 * checkpoint - int(RATIO * (layers - 6) * layer) + SPARE_BYTES


def layers_that_fit(config: Mapping[str, Any], layers: int, free: int) -> int:
    """As many as asked for, or as the disk has room for."""
    fitting = [n for n in range(7, layers + 1) if needed_bytes(config, n)[1] <= free]
    if not fitting:
        raise SystemExit(f"{free:,} bytes are free, 7 layers need {needed_bytes(config, 7)[1]:,}; make room")
    return fitting[-1]


def make_checkpoint(path: Path, config: Mapping[str, Any]) -> float:
    """Write it and let the page cache forget it, so that the run reads the disk; seconds."""
    from random_model import save_tokenizer, write_model

    start = time.perf_counter()
    write_model(path, config, max_shard_size=SHARD_BYTES)
    save_tokenizer(path)
    for file in path.glob("*.safetensors"):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return time.perf_counter() - start


@contextmanager
def memory_group(limit: int) -> Iterator[Path | None]:
    """A cgroup v2 that holds at most `limit` bytes and no swap; None where none can be made."""
    group = _new_group(limit)
    try:
        yield group
    finally:
        if group is not None:
            group.rmdir()


def _new_group(limit: int) -> Path | None:
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    own = [line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")]
    for root in [Path(fields[1]) for fields in mounts if fields[2] == "cgroup2"] if own else []:
        # Beside our own group: one with processes in it cannot have groups below it.
        parent = root if own[0] == "/" else (root / own[0].lstrip("/")).parent
        group = parent / f"streamprune-{os.getpid()}"
        try:
            if "memory" in (parent / "cgroup.subtree_control").read_text().split():
                group.mkdir()
                (group / "memory.max").write_text(str(limit))
                with suppress(OSError):  # a kernel without swap accounting has no such file
                    (group / "memory.swap.max").write_text("0")
                return group
        except OSError:
            with suppress(OSError):
                group.rmdir()
    return None


def usage(pid: int) -> dict[str, int]:
    """Bytes: "rss" and "peak_rss" while the process lives, and what it has read and written, also right after."""
    figures = {}
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(("VmRSS:", "VmHWM:")):
                figures["rss" if line.startswith("VmRSS") else "peak_rss"] = int(line.split()[1]) * 1024
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/io").read_text().splitlines():
            name, value = line.split(": ")
            figures[name] = int(value)
    return figures


def listen(child: subprocess.Popen[str], said: list[Any]) -> None:
    """Keep what the child says, a JSON object per event and lines of text, and show it; of progress now and then."""
    assert child.stdout is not None, "it is a pipe"
    shown = time.perf_counter()
    for line in child.stdout:
        event = json.loads(line) if line.startswith("{") else {"event": "text", "text": line.rstrip()}
        if event["event"] != "progress":
            said.append(event)
        elif time.perf_counter() - shown < SHOWN_SECONDS:
            continue
        shown = time.perf_counter()
        text = event.get("text") or event.get("message") or json.dumps(event)
        print("  | " + text.replace("\n", "\n  | "), file=sys.stderr, flush=True)


def supervise(command: list[str], limit: int) -> dict[str, Any]:
    """Run a command within `limit` bytes of resident memory: what it said and used, its exit code."""
    said: list[Any] = []
    figures: dict[str, Any] = {"killed": False, "said": said}
    with memory_group(limit) as group:
        figures["limited_by"] = "cgroup v2" if group else f"VmRSS every {POLL_SECONDS * 1000:.0f} ms"
        if group is not None:
            command = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs"), *command]
        start = time.perf_counter()
        # In a session of its own, so that Ctrl-C does not reach it: `_end` does.
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            listener = threading.Thread(target=listen, args=(child, said))
            listener.start()
            # Not reaped here: what a process has read and written can be asked for as long as it is not.
            while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                figures |= usage(child.pid)
                if group is None and figures.get("rss", 0) > limit:
                    figures["killed"] = True
                    child.kill()
                time.sleep(POLL_SECONDS)
            figures |= usage(child.pid)
            figures["seconds"], figures["code"] = time.perf_counter() - start, child.wait()
            listener.join()
        finally:
            _end(child)
    # The kernel kills in a group, nobody else does.
    figures["killed"] = figures["killed"] or (group is not None and figures["code"] == -signal.SIGKILL)
    return figures


def _end(child: subprocess.Popen[str]) -> None:
    """After Ctrl-C or an error here. What the child leaves behind lies in the directory that is removed."""
    if child.poll() is None:
        child.kill()
        child.wait()


def command_line(model: Path, output: Path, scratch: Path, limit: int, gpu_limit: int | None) -> list[str]:
    """The options; on a GPU where it has a limit."""
    gpu = ["--device", "cpu"] if gpu_limit is None else ["--device", "cuda", "--gpu-memory", str(gpu_limit)]
    return [
        *("--model", str(model), "--output", str(output), "--method", "moreau-gs", "--set", "steps=1"),
        *("--samples", str(SAMPLES), "--seq-len", str(SEQ_LEN), "--ratio", str(RATIO), "--no-evaluate"),
        *("--host-memory", str(limit), "--scratch", str(scratch), "--json-progress", *gpu),
    ]


def cut(name: str, kept: Mapping[str, Any], head_dim: int) -> tuple[int, Tensor] | None:
    """The dimension of a tensor that units cut, and the rows or columns of it that stay: what the output must hold."""
    parts = name.split(".")
    if parts[1] != "layers" or parts[-2] not in CUT:
        return None
    kind, dim = CUT[parts[-2]]
    units = torch.tensor(kept[parts[2]][kind])
    if kind == "kv_group":
        units = (units[:, None] * head_dim + torch.arange(head_dim)).flatten()
    return dim, units


def check_output(model: Path, output: Path) -> dict[str, int]:
    """Compare the output with the source and its kept units; how much was compared.

    Raises:
        Wrong: anything that is not as it should be.
    """
    from streamprune.storage.checkpoint import Checkpoint

    kept = json.loads((output / "streamprune.json").read_text())["kept"]
    with Checkpoint(model) as source, Checkpoint(output) as pruned:
        config = source.config
        check_widths(config, pruned.config, kept)
        if list(source.tensors) != list(pruned.tensors):
            raise Wrong("the output has other tensors than the source")
        smaller: dict[bool, list[str]] = {True: [], False: []}
        for name, entry in source.tensors.items():
            shape, lines = list(entry.shape), cut(name, kept, config["head_dim"])
            if lines is not None:
                shape[lines[0]] = len(lines[1])
            if pruned.tensors[name].shape != tuple(shape):
                raise Wrong(f"{name} is {pruned.tensors[name].shape}, the kept units make it {shape}")
            smaller[tuple(shape) != entry.shape].append(name)
        draw = random.Random(0)
        names = [name for which, count in COMPARED.items() for name in draw.sample(smaller[which], count)]
        for name in names:
            lines = cut(name, kept, config["head_dim"])
            expected = source.read(name) if lines is None else source.read(name).index_select(*lines)
            if not torch.equal(expected, pruned.read(name)):
                raise Wrong(f"{name} is not what the kept units leave of the source's")
    return {"shapes_compared": len(source.tensors), "values_compared": len(names), "bytes_after": pruned.nbytes}


def check_widths(config: Mapping[str, Any], pruned: Mapping[str, Any], kept: Mapping[str, Any]) -> None:
    """As many units as the ratio leaves, and the config of each layer says so."""
    n_layers, heads, channels = (config[k] for k in ("num_hidden_layers", "num_attention_heads", "intermediate_size"))
    per_head, per_channel = 4 * config["head_dim"] * config["hidden_size"], 3 * config["hidden_size"]
    fewer = math.floor(RATIO * heads)
    rest = RATIO * (heads * per_head + channels * per_channel) - fewer * per_head
    per_layer, digits = pruned.get("per_layer_config", {}), len(str(n_layers - 1))
    for layer in range(n_layers):
        cuts = 4 <= layer < n_layers - 2
        wanted = {"kv_group": heads - cuts * fewer, "channel": channels - cuts * round(rest / per_channel)}
        for kind, units in kept[str(layer)].items():
            if len(units) != wanted[kind] or units != sorted(set(units)):
                raise Wrong(f"layer {layer} keeps {len(units)} units of {kind}, not {wanted[kind]} ascending ones")
        widths = {**pruned, **per_layer.get(f"{layer:0{digits}d}", {})}
        said = [widths[k] for k in ("num_attention_heads", "num_key_value_heads", "intermediate_size")]
        if said != [wanted["kv_group"], wanted["kv_group"], wanted["channel"]]:
            raise Wrong(f"config.json gives layer {layer} the widths {said}, its units are {wanted}")


def stage_seconds(figures: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each stage as the tool says them, and those in which it waited for reads."""
    stages = [event for event in figures["said"] if event["event"] == "done"]
    waits = {"waiting for reads": sum(event["waiting_share"] * event["elapsed_seconds"] for event in stages)}
    return {event["stage"]: event["elapsed_seconds"] for event in stages} | waits


def show(figures: Mapping[str, Any]) -> str:
    """The table that is printed."""
    from streamprune.figures import human, table

    gpu = figures["gpu_limit"] is not None and "scoring" in figures

    peak, limit = figures.get("peak_rss", 0), figures["limit"]
    rows = [
        ["", "figure"],
        ["layers", f"{figures['layers']} of {figures['layers_asked']} asked for"],
        ["checkpoint", f"{human(figures['checkpoint_bytes'])}, {figures['checkpoint_bytes'] / limit:.1f} x the limit"],
        ["limit", f"{human(limit)}, by {figures['limited_by']}"],
        ["peak RSS (VmHWM)", f"{human(peak)}, {peak / limit:.0%} of the limit"],
        *([["- planned by the tool", human(figures["memory"]["planned_host"])]] if "memory" in figures else []),
        *([["GPU's limit", human(figures["gpu_limit"])]] if gpu else []),
        *([["peak of tensors there", human(figures["scoring"]["peak_gpu"])]] if gpu else []),
        *([["- planned by the tool", human(figures["memory"]["planned_gpu"])]] if gpu else []),
        ["read", f"{human(figures['rchar'])}, from the disk {human(figures['read_bytes'])}"],
        ["written", f"{human(figures['wchar'])}, to the disk {human(figures['write_bytes'])}"],
        ["seconds", f"{figures['seconds']:.1f}"],
        *([f"- {stage}", f"{seconds:.1f}"] for stage, seconds in figures["stage_seconds"].items()),
    ]
    if "values_compared" in figures:
        rows.append(["output", f"{human(figures['bytes_after'])}, {figures['shapes_compared']} shapes as expected"])
        rows.append(["values compared", f"{figures['values_compared']} tensors, all equal"])
    return table(rows, markdown=True)


def verdicts(figures: Mapping[str, Any]) -> str:
    """The targets, and whether they are met."""
    ended = figures["code"] == 0
    how = ", killed" if figures["killed"] else "" if ended else f", ended with {figures['code']}"
    within = ended and figures["peak_rss"] <= figures["limit"]
    right = "values_compared" in figures
    lines = [
        f"{'met' if within else 'MISSED'}: peak RSS <= limit{how}",
        f"{'met' if right else 'MISSED'}: the output is what its kept units leave of the source"
        + (f": {figures['wrong']}" if "wrong" in figures else ""),
    ]
    return "\n".join(lines)


def measure(directory: Path, config: Mapping[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
    """Write the checkpoint, prune it, check what came out."""
    model, output = directory / "model", directory / "pruned"
    figures["write_seconds"] = make_checkpoint(model, config)
    print(f"wrote {figures['checkpoint_bytes']:,} bytes in {figures['write_seconds']:.1f} s", file=sys.stderr)
    options = command_line(model, output, directory / "scratch", figures["limit"], figures["gpu_limit"])
    print(f"streamprune {' '.join(options)}", file=sys.stderr)
    figures |= {"options": options, **supervise([*COMMAND, *options], figures["limit"])}
    figures["stage_seconds"] = stage_seconds(figures)
    if figures["code"] == 0:
        facts = json.loads((output / "streamprune.json").read_text())
        figures |= {name: facts[name] for name in ("memory", "scoring") if name in facts}
        try:
            figures |= check_output(model, output)
        except Wrong as error:
            figures["wrong"] = str(error)
    return figures


@click.command()
@click.option("--scratch", type=click.Path(path_type=Path), required=True, help="Directory with 50 GB free.")
@click.option("--layers", type=click.IntRange(7), default=40, show_default=True)
@click.option("--memory", default="6GiB", show_default=True, callback=byte_size, help="Resident memory of the run.")
@click.option("--gpu-memory", callback=byte_size, help="Compute on a GPU, within this much of its memory.")
@click.option("--keep", is_flag=True, help="Leave the checkpoint.")
@click.option("--dry", is_flag=True, help="8 tiny layers in 1 GiB: only to see that everything runs.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the figures here.")
def main(
    scratch: Path, layers: int, memory: int, gpu_memory: int | None, keep: bool, dry: bool, json_file: Path | None
) -> None:
    """Measure, print the table, and write JSON."""
    config = {**CONFIG, **(DRY if dry else {})}
    asked, limit = (8, 2**30) if dry else (layers, memory)
    scratch.mkdir(parents=True, exist_ok=True)
    depth = layers_that_fit(config, asked, shutil.disk_usage(scratch).free)
    if depth < asked:
        print(f"{scratch} has no room for {asked} layers and their output: {depth} of them", file=sys.stderr)
    config["num_hidden_layers"] = depth
    figures = {"layers": depth, "layers_asked": asked, "limit": limit, "gpu_limit": gpu_memory}
    figures["checkpoint_bytes"] = needed_bytes(config, depth)[0]
    # A plain kill would leave 50 GB behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    directory = Path(tempfile.mkdtemp(prefix="larger-", dir=scratch))
    try:
        figures = measure(directory, config, figures)
    finally:
        for path in directory.iterdir():
            if not (keep and path.name == "model"):
                shutil.rmtree(path, ignore_errors=True)
        if keep:
            print(f"the checkpoint is left in {directory / 'model'}", file=sys.stderr)
        else:
            directory.rmdir()
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, {SAMPLES} x {SEQ_LEN} tokens\n\n{show(figures)}\n")
    print(verdicts(figures))
    if json_file:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")
    if "values_compared" not in figures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
