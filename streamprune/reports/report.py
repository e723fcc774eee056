"""Report of a run: one HTML file beside its output that needs nothing else."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from streamprune.config import PruneConfig
from streamprune.output.card import loading_lines, what_was_done
from streamprune.planning.decision import written_form
from streamprune.recovery.options import RecoverConfig
from streamprune.reports import page, sections
from streamprune.reports.outputs import PrunedOutput, read_output
from streamprune.reports.tasks import TaskTable, task_section
from streamprune.schema import default_of, flag_of
from streamprune.storage.directory import check_file, write_whole

REPORT_FILE = "report.html"
NEVER_REPEATED = ("overwrite", "resume")  # they are of the moment


def report(
    directory: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    tasks: str | os.PathLike[str] | None = None,
    tasks_before: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the report of an output, and return its path.

        print(report("pruned"))

    Args:
        output: file to write; by default report.html in the directory, whose last one is replaced.
        tasks, tasks_before: files that `streamprune eval --tasks --json` wrote, of the pruned and the dense model.
        overwrite: replace `output` if it exists.

    Raises:
        CheckpointError: no output of streamprune, or its streamprune.json is damaged.
        OutputError: the file exists or cannot be written.
    """
    found = read_output(Path(directory))
    file = found.path / REPORT_FILE if output is None else Path(output)
    check_file(file, "--output", overwrite=overwrite or output is None)
    measured = TaskTable.read(tasks, tasks_before)
    text = found.read(lambda facts: report_page(found, measured))
    write_whole(file, text.encode("utf-8", errors="backslashreplace"))
    return file


def report_page(output: PrunedOutput, tasks: TaskTable) -> str:
    """Make the page."""
    facts = output.facts
    name = f"{facts['base_model']}, pruned"
    parts = [
        page.heading(name, 1),
        page.paragraph(f"{what_was_done(facts)} with streamprune {facts['versions']['streamprune']}."),
        *sections.result_section(output),
        *sections.recovery_section(facts),
        *task_section(tasks),
        *sections.speed_section(facts),
        page.heading("What every layer keeps"),
        *sections.widths_section(output),
        page.heading("Scores"),
        *sections.scores_section(output),
        page.heading("Where the seconds went"),
        *sections.stages_section(facts),
        page.heading("Memory and traffic"),
        *sections.over_time_section(facts),
        page.heading("To repeat it"),
        page.code("\n".join([repeat_line(facts), *training_lines(facts)])),
        page.cells(_versions(facts), "versions"),
        page.heading("To load it"),
        page.code("\n".join(loading_lines(written_form(facts)))),
    ]
    return page.document(name, parts)


def repeat_line(facts: Mapping[str, Any]) -> str:
    """Write the command that prunes to the same: options that are not the default, as they were decided."""
    return shlex.join(["streamprune", *_options(PruneConfig, facts["options"])])


def training_lines(facts: Mapping[str, Any]) -> list[str]:
    """Write the commands of the trainings that followed, the earliest first."""
    training, lines = facts.get("recovery"), list[str]()
    while training is not None:
        lines.insert(0, shlex.join(["streamprune", "recover", *_options(RecoverConfig, training["options"])]))
        training = training.get("earlier")
    return lines


def _options(config: type[PruneConfig | RecoverConfig], options: Mapping[str, Any]) -> list[str]:
    words = list[str]()
    for each in fields(config):
        value = options.get(each.name)
        if value is not None and value != default_of(each) and each.name not in NEVER_REPEATED:
            words += _option(each.name, value, options)
    return words


def _option(name: str, value: Any, options: Mapping[str, Any]) -> Sequence[str]:
    """Write an option as the command line takes it."""
    if name == "settings":
        return [word for key, of in value.items() if of is not None for word in ("--set", f"{key}={of}")]
    if name == "evaluate" and value is False:
        return ["--no-evaluate"]
    if name == "allocation" and options["granularity"] != "units":
        return []
    if name == "compensate_target" and not options.get("compensate"):
        return []
    if name in ("rank", "alpha") and options.get("init_adapter") is not None:  # which has its own
        return []
    if name == "layers":
        return [flag_of(name), "{}:{}".format(*value)]
    if value is True:
        return [flag_of(name)]
    return [flag_of(name), str(value)]


def _versions(facts: Mapping[str, Any]) -> list[list[str]]:
    return [["package", "version"], *([name, str(value)] for name, value in facts["versions"].items())]
