"""The kernels: machine code, traffic, and time on a CPU or a GPU.

    python bench/kernels.py --static     registers, shared memory and loads of every kernel, for cards that are not here
    python bench/kernels.py --traffic    bytes per element, counted from loads and stores, beside eager torch
    python bench/kernels.py --cpu        the torch side against the plain expression, by threads
    python bench/kernels.py --shares     their part in the seconds of a moreau-gs run on SmolLM2-135M
    python bench/kernels.py --gpu        GB/s and TFLOP/s against a device copy and a cuBLAS product of the same run

Each prints a table; --json keeps the figures.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

MODES = ("static", "traffic", "cpu", "shares", "gpu")


def static(options: dict[str, Any]) -> tuple[list[list[str]], Any]:
    """A row per kernel: registers per thread, shared memory per program, and most resident threads on each target.

    Model sizes share a row where the code is as large. Local memory is the most of any target (0: nothing is spilled).
    """
    from kernel_cases import COMPILED, SIZES, cases
    from machine_code import TARGETS, amd, nvidia

    targets = options["targets"] or TARGETS
    rows = [["kernel", "model", *targets, "local B", "least B/element", "load bits", "tensor core", "async"]]
    figures = []
    for case in cases():
        models: dict[tuple[str, ...], list[str]] = {}
        for model in COMPILED:
            launch = case.make(case.operands(SIZES[model], "meta")).launch
            codes = [nvidia(launch, int(name[3:])) if name.startswith("sm_") else amd(launch, name) for name in targets]
            for target, code in zip(targets, codes, strict=True):
                figures.append({"kernel": case.name, "model": model, "target": target, **code.as_dict()})
            cells = [f"{code.registers} r, {code.shared / 1024:.1f} K, {code.occupancy:.0%}" for code in codes]
            # An AMD compiler may split a load; what counts there is that nothing is spilled.
            widths = sorted({bits for code in codes[: len(targets) - ("gfx942" in targets)] for bits in code.loads})
            tail = (max(code.local for code in codes), f"{case.minimum:.0f}", ", ".join(map(str, widths)))
            counts = (max(code.tensor_cores for code in codes), max(code.async_copies for code in codes))
            models.setdefault((*cells, *map(str, (*tail, *counts))), []).append(model)
        rows += [[case.name, ", ".join(names), *cells] for cells, names in models.items()]
    return rows, figures


def main_table(mode: str, options: dict[str, Any]) -> tuple[list[list[str]], Any]:
    """Rows and figures of one mode. Modules come late: Triton is told at its first import whether to interpret."""
    if mode == "static":
        return static(options)
    if mode == "traffic":
        os.environ["TRITON_INTERPRET"] = "1"
        from kernel_traffic import traffic

        return traffic(dry=options["dry"])
    if mode == "gpu" and options["dry"]:
        os.environ["TRITON_INTERPRET"] = "1"
    import kernel_times

    return {"cpu": kernel_times.cpu, "shares": kernel_times.shares, "gpu": kernel_times.gpu}[mode](options)


@click.command()
@click.option("--static", "mode", flag_value="static")
@click.option("--traffic", "mode", flag_value="traffic")
@click.option("--cpu", "mode", flag_value="cpu")
@click.option("--shares", "mode", flag_value="shares")
@click.option("--gpu", "mode", flag_value="gpu")
@click.option("--model", default="1.7B", show_default=True, help="Size of the matrices: 135M, 1.7B, 13B or 70B.")
@click.option("--target", "targets", multiple=True, help="With --static: sm_80, sm_86, sm_89, sm_90, gfx942; or all.")
@click.option("--dry", is_flag=True, help="Small matrices, two repetitions; with --gpu, on the CPU.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the figures here.")
def main(mode: str | None, model: str, targets: tuple[str, ...], dry: bool, json_file: Path | None) -> None:
    """Measure, print a table, write JSON."""
    if mode is None:
        raise click.UsageError("one of " + ", ".join(f"--{name}" for name in MODES))
    sys.path.insert(0, str(Path(__file__).parent))
    rows, figures = main_table(mode, {"model": model, "dry": dry, "targets": targets})
    from streamprune.figures import table

    print(table(rows, markdown=True))
    if json_file:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
