"""`report.html`: whole by itself, said in words, escaped, as recorded, and on a phone without a sideways scroll."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import check_refusal, snapshot
from tiny_models import save_tiny

from streamprune import PruneConfig, prune, report
from streamprune.cli import cli
from streamprune.commands.prune import config_of_options
from streamprune.errors import CheckpointError, UsageError
from streamprune.reports.report import repeat_line

NAME = '<b>llama & "co"</b>'.replace("/", "-")
VOID = {"meta", "rect", "line", "polyline"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """A page as the standard library reads it: elements with their attributes, and text by element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "elements are closed in their order"

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag: str = "") -> str:
        return "\n".join(data for of, data in self.texts if tag in ("", of))


RUNS: dict[str, dict[str, Any]] = {
    "units": {"method": "taylor", "ratio": 0.4},
    "repaired": {"method": "wanda-sp", "allocation": "global", "compensate": True, "compensate_tokens": 4096},
    "repaired, without biases": {"method": "flap", "compensate": True, "compensate_tokens": 256},
    "layers": {"method": "block-influence", "granularity": "layers", "ratio": 0.4},
    "weights": {"method": "wanda", "granularity": "weights"},
    "not measured": {"method": "random", "stock": True, "evaluate": False},
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs of a model with a name that is HTML."""
    place = tmp_path_factory.mktemp("outputs")
    save_tiny(place / NAME, "llama", dtype=torch.float32, num_hidden_layers=8)
    for name, options in RUNS.items():
        text = {} if options["method"] == "random" else {"samples": 2, "seq_len": 16}
        layers = {} if options.get("stock") else {"layers": (2, 7)}
        prune(PruneConfig(model=place / NAME, output=place / name, **(text | layers | options)))
    return place


def facts(output: Path) -> dict[str, Any]:
    return json.loads((output / "streamprune.json").read_text())


@pytest.fixture(params=RUNS)
def page(request: pytest.FixtureRequest, outputs: Path) -> Page:
    return Page(report(outputs / request.param).read_text(encoding="utf-8"))


def test_the_page_needs_nothing_beside_it(page: Page) -> None:
    assert page.open == []
    for _, attributes in page.elements:
        assert not {"href", "src", "srcset", "action", "onclick"} & attributes.keys()
    assert not page.all("script") and not page.all("link")
    assert "http" not in page.text().replace("http://www.w3.org/2000/svg", "")
    assert "url(" not in page.text("style") and "@import" not in page.text("style")


def test_every_figure_is_said_in_words(page: Page) -> None:
    for svg in page.all("svg"):
        assert svg["role"] == "img" and len(svg["aria-label"] or "") > 20
    assert len(page.all("svg")) == len(page.all("figure")) == len(page.all("title")) - 1
    assert len(page.all("figcaption")) == len(page.all("figure"))


def test_what_is_wide_scrolls_by_itself(page: Page) -> None:
    boxes = [each for each in page.all("div") if each.get("class") == "wide"]
    assert len(boxes) == len(page.all("svg")) + len(page.all("table"))
    assert all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)
    (viewport,) = [each for each in page.all("meta") if each.get("name") == "viewport"]
    assert viewport["content"] == "width=device-width, initial-scale=1"
    assert "prefers-color-scheme: dark" in page.text("style")


def test_names_are_escaped(outputs: Path) -> None:
    text = report(outputs / "units").read_text(encoding="utf-8")
    assert escape(NAME) in text and NAME not in text
    assert not Page(text).all("b")
    assert Page(text).text("h1") == f"{NAME}, pruned"


def test_figures_are_those_that_were_recorded(outputs: Path) -> None:
    known, page = facts(outputs / "units"), Page(report(outputs / "units").read_text(encoding="utf-8"))
    cells = page.text("td").splitlines()
    for value in (*known["parameters"].values(), *known["bytes"].values()):
        assert f"{value:,}" in cells
    for name in ("before", "after"):
        assert f"{known['perplexity'][name]:.2f}" in cells
    for stage in known["stages"]:
        assert stage["name"] in cells and f"{stage['elapsed_seconds']:.1f}" in cells
    kept = {layer: len(kinds["channel"]) for layer, kinds in known["kept"].items()}
    assert f"{kept['0']} in layers 0 to 1, {kept['2']} in layers 2 to 6, {kept['7']} in layer 7" in page.text()
    assert "the cut lies in 5 of 5 layers" in page.text()


@pytest.mark.parametrize("name", RUNS)
def test_the_recipe_gives_the_same_options(name: str, outputs: Path) -> None:
    known = facts(outputs / name)
    program, *arguments = shlex.split(repeat_line(known))
    context = cli.make_context("streamprune", arguments)
    options = {key: value for key, value in context.params.items() if key not in ("quiet", "json_progress", "debug")}
    options.pop("report")
    config = config_of_options(options)
    assert program == "streamprune" and str(config.output) == known["options"]["output"]
    for field, value in known["options"].items():
        if field in ("settings", "layers", "compensate_target", "allocation", "output"):
            continue
        assert getattr(config, field) == value, field
    again = prune(PruneConfig(**{**vars(config), "output": outputs / f"{name} again"}))
    for file in ("model.safetensors",):
        assert (again.output / file).read_bytes() == (outputs / name / file).read_bytes()


def test_an_output_of_an_older_version_has_a_report(outputs: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(outputs / "units", tmp_path / "copy"))
    (copy / "streamprune.scores").unlink()
    known = facts(copy)
    for name in ("stages", "timeline"):
        del known[name]
    del known["memory"]["planned_disk"]
    (copy / "streamprune.json").write_text(json.dumps(known))
    text = Page(report(copy).read_text(encoding="utf-8")).text()
    assert "recorded no stages" in text and "Not recorded" in text and "Scores are not kept" in text


def test_tasks_are_shown_beside_the_dense_model_s(outputs: Path, tmp_path: Path) -> None:
    def write(file: Path, value: float) -> Path:
        score = {"task": "arc_easy", "metric": "acc", "value": value, "stderr": 0.01, "n": 100, "main": True}
        file.write_text(json.dumps({"scores": [score], "dtype": "float32", "mean": value, "mean_stderr": None}))
        return file

    pruned, dense = write(tmp_path / "pruned.json", 0.25), write(tmp_path / "dense.json", 0.5)
    text = report(outputs / "units", tmp_path / "r.html", tasks=pruned, tasks_before=dense).read_text()
    cells = Page(text).text("td").splitlines()
    assert cells[cells.index("arc_easy") :][:5] == ["arc_easy", "acc", "0.5000 ± 0.0100", "0.2500 ± 0.0100", "mean"]


# The command.


def test_a_run_with_report_writes_it(model: Path, output: Path, streamprune: Any) -> None:
    options = ("--method", "magnitude", "--no-evaluate", "--quiet", "--report")
    done = streamprune("--model", model, "--output", output, *options)
    assert done.code == 0 and done.out.splitlines()[-1] == f"wrote {output / 'report.html'}"
    written = (output / "report.html").read_text()
    assert streamprune("report", output).code == 0
    assert (output / "report.html").read_text() == written


def test_another_file_is_replaced_only_if_asked_to(outputs: Path, tmp_path: Path, streamprune: Any) -> None:
    file = tmp_path / "mine.html"
    file.write_text("mine")
    check_refusal(streamprune("report", outputs / "units", "--output", file), 1, ("mine.html", "exists"))
    assert file.read_text() == "mine"
    assert streamprune("report", outputs / "units", "--output", file, "--overwrite").code == 0
    assert file.read_text().startswith("<!DOCTYPE html>")
    assert [each.name for each in tmp_path.iterdir()] == ["mine.html"]


def test_what_is_not_ours_is_refused(tiny_llama: Path, tmp_path: Path, streamprune: Any) -> None:
    for directory in (tiny_llama, tmp_path / "nowhere"):
        check_refusal(streamprune("report", directory), 1, (str(directory), "streamprune.json"))
    assert not (tiny_llama / "report.html").exists()


@pytest.mark.parametrize("gone", ["parameters", "versions", "memory", "seconds", "base_model"])
def test_a_damaged_record_leaves_nothing(gone: str, outputs: Path, tmp_path: Path, streamprune: Any) -> None:
    copy = Path(shutil.copytree(outputs / "units", tmp_path / "copy"))
    (copy / "report.html").unlink(missing_ok=True)
    known = facts(copy)
    del known[gone]
    (copy / "streamprune.json").write_text(json.dumps(known))
    before = snapshot(copy)
    check_refusal(streamprune("report", copy), 1, ("copy/streamprune.json", gone))
    assert snapshot(copy) == before


def test_tasks_of_another_kind_are_refused(outputs: Path, tmp_path: Path, streamprune: Any) -> None:
    (tmp_path / "wrong.json").write_text('{"scores": [{"task": "piqa"}]}')
    result = streamprune("report", outputs / "units", "--tasks", tmp_path / "wrong.json")
    check_refusal(result, 2, ("wrong.json", "eval --tasks --json"))


# In a browser.

MEASURE = """
<script>
const frame = document.getElementById("page");
frame.onload = () => {
  const inner = frame.contentDocument.documentElement;
  document.getElementById("found").textContent = `${frame.contentWindow.innerWidth} ${inner.scrollWidth}`;
};
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("name", ["units", "layers", "weights"])
def test_a_browser_shows_it_without_a_sideways_scroll(name: str, width: int, outputs: Path, tmp_path: Path) -> None:
    """A window is never as narrow as a phone: the page is in a frame of that width."""
    assert CHROMIUM is not None
    inner = escape(report(outputs / name, tmp_path / "report.html").read_text(encoding="utf-8"), quote=True)
    outer = tmp_path / "frame.html"
    frame = f'<iframe id="page" style="border: 0; width: {width}px; height: 900px" srcdoc="{inner}"></iframe>'
    outer.write_text(f'<!DOCTYPE html><meta charset="utf-8"><p id="found"></p>{frame}{MEASURE}', encoding="utf-8")
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [CHROMIUM, *options, "--dump-dom", "--virtual-time-budget=5000", profile, outer.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found = re.search(r'<p id="found">(\d+) (\d+)</p>', done.stdout)
    assert found is not None and int(found[1]) == width
    assert int(found[2]) == width, "the page is as wide as the window"
    assert "CONSOLE" not in done.stderr


@pytest.mark.parametrize("number", [0, 10**400], ids=["zero", "huge"])
def test_numbers_that_cannot_be_are_refused(number: int, outputs: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(outputs / "units", tmp_path / "copy"))
    known = facts(copy)
    if number:
        known["stages"][0]["bytes_read"] = number
    else:
        known["parameters"]["before"] = number
    (copy / "streamprune.json").write_text(json.dumps(known))
    with pytest.raises(CheckpointError, match="is not as streamprune writes it"):
        report(copy)
    score = {"task": "arc_easy", "metric": "acc", "value": 10**400, "stderr": None, "n": 1, "main": True}
    (tmp_path / "tasks.json").write_text(json.dumps({"scores": [score], "dtype": "float32", "mean": None}))
    with pytest.raises(UsageError, match="is not as streamprune eval"):
        report(outputs / "units", tmp_path / "page.html", tasks=tmp_path / "tasks.json")
