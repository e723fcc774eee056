"""What README and docs/ say is so: commands parse, code runs, links resolve, and a figure stands in one place."""

import json
import re
import shlex
import shutil
import sys
import tomllib
import types
from functools import cache
from itertools import combinations
from pathlib import Path

import click
import psutil
import pytest
import torch
from tiny_models import FAMILY_FIELDS, merge_once, save_tiny

from streamprune import PruneConfig, prune
from streamprune.cli import cli
from streamprune.commands import demo
from streamprune.methods.table import METHODS
from streamprune.model.families import FAMILIES
from streamprune.planning.rates import default_cache

ROOT = Path(__file__).parent.parent
README, BENCH = ROOT / "README.md", ROOT / "bench" / "README.md"
DOCS = sorted(ROOT.joinpath("docs").glob("*.md"))
OURS = [README, ROOT / "CONTRIBUTING.md", *DOCS]
FENCE = re.compile(r"(?:^<!-- (?P<note>[^>]*) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
MODEL = "path/to/model"
REAL = default_cache() / demo.MODEL_NAME


def name_of(file):
    return str(file.relative_to(ROOT))


pages = pytest.mark.parametrize("page", OURS, ids=name_of)


@cache
def blocks(page):
    """(note, language, code) of the fenced blocks."""
    return [(each["note"] or "", each["language"], each["code"]) for each in FENCE.finditer(page.read_text())]


@cache
def prose(page):
    return FENCE.sub("", page.read_text())


# Its form.


def test_the_readme_takes_two_minutes():
    assert len(README.read_text().splitlines()) <= 150


@pages
def test_lines_are_at_most_120_wide_and_tables_100(page):
    for line in page.read_text().splitlines():
        assert len(line) <= (100 if line.startswith("|") else 120), line


def anchors(page):
    """GitHub's names of a page's headings."""
    found = []
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.M):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{name}-{found.count(name)}" if name in found else name)
    return found


@pytest.mark.parametrize("page", [*OURS, BENCH], ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)", README.read_text()))
    assert {name_of(page) for page in DOCS} <= linked


# Figures.

# At least three digits, with a decimal point, a unit, or in millions; numbers of versions and papers are taken out.
FIGURE = re.compile(r"(?<![\w.,^-])(\d+\.\d+|\d{1,3}(?:,\d{3}){2,}|\d+(?= ?(?:s|ms|[KMGT]i?B|TFLOP)\b))(?![\w.,]*\d)")
PACKAGES = "torch|Triton|Python|NumPy|transformers|llmcompressor|compressed-tensors|vLLM|airllm"
NOT_MEASURED = re.compile(rf"`[^`]*`|\]\([^)]*\)|\b\d{{4}}\.\d{{5}}\b|\b(?:{PACKAGES})(?:(?:,| and| or| to)? [\d.]+)+")


def figures(text):
    """The measured figures in a text."""
    found = FIGURE.findall(NOT_MEASURED.sub("", text))
    return {figure for figure in found if len(re.sub(r"\D", "", figure).lstrip("0")) >= 3}


def test_what_a_figure_is():
    measured = "from 83.3 to 1,234,567 in 504 s, 0.994, 97.1 (12.5)."
    others = "torch 2.11, 2.13 and 2.14; `--ratio 0.25`, 2305.11627, 0.2, 64 s, 128 tokens, 65,536 tokens, SmolLM2-135M"
    assert figures(measured) == {"83.3", "1,234,567", "504", "0.994", "97.1", "12.5"}
    assert figures(others) == set()


def test_a_figure_stands_on_one_page():
    """bench/README.md has raw tables, which docs/ do not repeat; six rows of them stand in the README as well."""
    both = {page: figures(prose(page)) for page in [*OURS, BENCH]}
    for one, other in combinations(both, 2):
        if {one, other} != {README, BENCH}:
            assert not both[one] & both[other], f"{name_of(one)} and {name_of(other)}"


def rows(page, first):
    """The cells of the table whose head begins with `first`."""
    table = re.search(rf"^\| {re.escape(first)} .*\n\|[-:| ]*\n((?:\|.*\n)+)", page.read_text(), re.M)
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[1].splitlines()]


def test_the_readmes_results_are_those_of_the_file():
    measured = {}
    for name in ("policy", "policy-float32", "quality-h100"):  # of a CPU, and what a GPU has done too
        for key, runs in json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text()).items():
            measured[key] = measured.get(key, {}) | runs
    keys = {
        "20 % of the units, layers 4:28": ("units", "20%", "20% compensated"),
        "50 % of the units, layers 4:28": ("policy", "50% thinet", "50% thinet, repaired, compensated"),
        "3 of the layers 4:28": ("layers", "3 layers", "3 layers, compensated"),
        "50 % of the weights": ("weights", "50%", None),
        "2 of every 4 weights": ("weights", "2:4", None),
    }
    (results,) = [rows(README, "method            | what goes")]
    assert len(results) == 6
    for method, what, *shown in results:
        table, *settings = keys[what]
        found = measured[f"{table}/{method.strip('`')}/0"]
        expected = [f"{found[each]['perplexity']['test 128']:.1f}" if each else "-" for each in settings]
        assert shown == expected


def test_the_pictures_are_those_of_the_files(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import pictures

    for name, draw in pictures.PICTURES.items():
        assert (ROOT / "docs" / name).read_text() == draw()


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "methods.md"], ids=name_of)
def test_tables_of_methods_have_all_of_them(page):
    named = [name for cell, *_ in rows(page, "method") for name in re.findall(r"`([\w-]+)`", cell)]
    if page == README:
        table = page.read_text().partition("## Methods")[2].partition("A sweep")[0]
        named = re.findall(r"`([\w-]+)`", table)
        for method in METHODS.values():
            assert (number := re.search(r"\d{4}\.\d{5}", method.paper)) is None or number[0] in table
    assert named == list(METHODS)


def test_families_are_those_of_the_table():
    section = README.read_text().partition("## Families and limits")[2].partition("Only safetensors")[0]
    assert set(re.findall(r"\w+", section)) >= set(FAMILIES)
    table = " ".join(cell for cell, _ in rows(ROOT / "docs" / "outputs.md", "family"))
    assert sorted(re.findall(r"\w+", table)) == sorted(FAMILIES)


# Commands.


def commands(page):
    """Command lines of the blocks, continued lines joined, without what is printed."""
    for _, language, code in blocks(page):
        lines = code.replace("\\\n", " ").splitlines()
        prompt = "" if language == "sh" else "$ "
        known = tuple(f"{prompt}{program} " for program in ("streamprune", "make", "pip"))
        yield from (line.removeprefix(prompt) for line in lines if line.startswith(known))


def parse(arguments):
    """The command's own parser: unknown options, commands and values that do not parse are errors."""
    if arguments[0].startswith("-"):
        cli.make_context("streamprune", arguments)
    else:
        context = click.Context(cli)
        name, command, rest = cli.resolve_command(context, arguments)
        command.make_context(name, rest, parent=context)


@pages
def test_commands_parse(page):
    for line in commands(page):
        program, *arguments = shlex.split(line, comments=True)
        if program == "make":
            assert re.search(rf"^{arguments[0]}:", ROOT.joinpath("Makefile").read_text(), re.M), line
        elif program == "pip":
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert set(re.findall(r"\[(\w+)\]", line)) <= set(extras)
        else:
            parse(arguments)


def test_a_wrong_option_does_not_parse():
    for wrong in ("--metod taylor", "plan --samples many", "evil --model x"):
        with pytest.raises(click.UsageError):
            parse(wrong.split())


def all_options():
    """Those of the main command and of all others."""
    context = click.Context(cli)
    every = [cli, *(cli.get_command(context, name) for name in cli.list_commands(context))]
    every += [inner for command in every[1:] for inner in getattr(command, "commands", {}).values()]
    return {"--help"} | {option for command in every for each in command.params for option in each.opts}


@pages
def test_options_and_scripts_in_the_text_exist(page):
    known = all_options()
    for span in re.findall(r"`([^`\n]+)`", prose(page)):
        script = re.search(r"\bbench/(\w+\.(?:py|sh))", span)
        if script:
            text = ROOT.joinpath("bench", script[1]).read_text()
            assert all(option in text for option in re.findall(r"(--[a-z-]+)", span)), span
        elif span.startswith(("--", "streamprune ")):
            assert set(re.findall(r"(?<!\S)(--[a-z-]+)", span)) <= known, span


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A directory with a model at path/to/model, and what pruning it gave."""
    place = tmp_path_factory.mktemp("docs")
    save_tiny(place / MODEL, "llama", dtype=torch.float32, num_hidden_layers=8, max_position_embeddings=128)
    merge_once(place / MODEL)
    prune(PruneConfig(model=place / MODEL, output=place / "earlier", method="random", evaluate=False))
    (place / "data.jsonl").write_text(json.dumps({"text": "The harbour was quiet in the morning. " * 20}) + "\n")
    return place


@pytest.fixture
def at_home(tiny, tmp_path, monkeypatch):
    """A copy of it, as the working directory."""
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


SHORT = ("--samples", "2", "--seq-len", "16")


@pages
def test_commands_on_a_small_model_run(page, at_home, streamprune):
    """Those with a placeholder for the model, or with what pruning it gave; others name models that are not here."""
    shutil.move("earlier", "pruned")
    for line in commands(page):
        program, *arguments = shlex.split(line, comments=True)
        if program == "streamprune" and {MODEL, "pruned"} & {*arguments[1:2], *arguments[2:3]}:
            more = (*SHORT, "--no-evaluate", "--overwrite") if arguments[0].startswith("--") else ()
            done = streamprune(*arguments, *more)
            assert done.code == 0, (line, done)


def test_completion_is_for_the_installed_command(streamprune, monkeypatch):
    monkeypatch.setenv("_STREAMPRUNE_COMPLETE", "bash_source")
    assert "_streamprune_completion" in streamprune().out
    for shell in ("bash", "fish"):
        assert f"_STREAMPRUNE_COMPLETE={shell}_source streamprune" in (ROOT / "docs" / "faq.md").read_text()


# Plans.


def plans(page):
    for _, _, code in blocks(page):
        if code.startswith("$ streamprune plan"):
            command, _, said = code.removeprefix("$ streamprune ").replace("\\\n", " ").partition("\n")
            yield shlex.split(command), said


def without_memory(said):
    """A plan's lines, broken ones joined; of the host's memory, which is that of this process too, none."""
    lines = re.sub(r"\n  (?=\S)", " ", said).splitlines()
    rule = next(number for number, line in enumerate(lines) if line.startswith("-----"))
    columns = [match.span() for match in re.finditer("-+", lines[rule])]
    (start, end) = next(span for span in columns if "memory" in lines[rule - 1][slice(*span)])
    width = len(lines[rule])
    for number, line in enumerate(lines):
        if len(line) == width and number >= rule - 1:
            lines[number] = " ".join((line[:start] + line[end:]).replace("---", "").split())
    return [re.sub(r"and [\d.]+ [MG]B of memory", "", line) for line in lines]


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "planning.md"], ids=name_of)
def test_plans_are_those_of_the_script(page, tmp_path, monkeypatch, streamprune):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import plans as script
    from random_model import save_tokenizer

    monkeypatch.chdir(tmp_path)
    # As large as the command's process: the page cache has what it leaves.
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: types.SimpleNamespace(rss=500 << 20))
    Path("c4.txt").write_text("A text. " * 10000)
    shown = list(plans(page))
    assert shown
    for arguments, said in shown:
        name = arguments[arguments.index("--model") + 1]
        if not Path(name).exists():
            script.write_headers(Path(name), script.MODELS[name])
            save_tokenizer(Path(name))
        options = " ".join(each for each in arguments if each not in ("plan", "--model", name, "--no-evaluate"))
        assert (name, options) in script.PLANS
        done = streamprune(*arguments)
        assert done.code == 0, done.err
        lines = iter(without_memory(done.out))
        missing = [line for line in without_memory(said) if line not in lines]  # in this order, and others between
        assert missing == []


@pytest.mark.model
@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not there; `streamprune demo --fetch-only` makes it")
def test_the_first_run_is_as_it_begins(monkeypatch, streamprune):
    (shown,) = (code for *_, code in blocks(README) if code.startswith("$ streamprune --model SmolLM2"))
    command, _, said = shown.partition("\n")
    monkeypatch.chdir(REAL.parent)
    done = streamprune("plan", *shlex.split(command)[2:])
    assert done.code == 0, done.err
    begun = said.partition("calibration on")[0]
    assert " ".join(begun.split()) in " ".join(done.out.split())


# Code.


@pages
def test_python_compiles(page):
    for _, language, code in blocks(page):
        if language == "python":
            compile(code, name_of(page), "exec")


@pages
def test_python_runs(page, at_home):
    """All but what is marked; one after another, in a directory where the first may make what the next one loads."""
    codes = [code for note, language, code in blocks(page) if language == "python" and not note]
    if codes and "prune(" not in codes[0]:
        shutil.move("earlier", "pruned")
    for code in codes:
        exec(compile(code, name_of(page), "exec"), {"__name__": "example"})


def example(name):
    """The code of an example of extending.md, as one module."""
    module = types.ModuleType(f"example_{name}")
    code = "\n".join(code for note, _, code in blocks(ROOT / "docs" / "extending.md") if note == f"example: {name}")
    sys.modules[module.__name__] = module  # dataclasses and click look their module up
    exec(compile(code, f"docs/extending.md, {name}", "exec"), module.__dict__)
    return module


def test_the_example_of_a_method(tmp_path, at_home, monkeypatch, streamprune):
    module = example("method")
    module.test_matrices_of_a_channel_count_alike(tmp_path / "plain")
    monkeypatch.setitem(METHODS, module.ROW.name, module.ROW)
    done = streamprune("--model", MODEL, "--method", "taylor-even", "--set", "power=0.5", "--output", "out", *SHORT)
    assert done.code == 0, done.err
    assert "taylor-even" in streamprune("methods").out


def test_the_example_of_a_family(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILY_FIELDS, "gemma", None)  # what the example adds goes again
    module = example("family")
    monkeypatch.setitem(FAMILIES, "gemma", module.ROW)
    module.test_the_output_is_the_masked_dense_model(tmp_path)


def test_the_example_of_a_command(monkeypatch, streamprune, earlier, tmp_path):
    monkeypatch.setattr(cli, "commands", dict(cli.commands))
    example("command").test_widths_are_said(streamprune, earlier, tmp_path)


def test_the_example_of_a_need(monkeypatch, model, output):
    module = example("need")
    monkeypatch.setitem(METHODS, "spread", module.ROW)
    module.test_the_plan_counts_it(model, output)


def test_the_example_of_a_format(tmp_path, output):
    save_tiny(tmp_path / "half", "llama", dtype=torch.bfloat16)
    example("format").test_norms_are_float32(tmp_path / "half", output)


def test_the_example_of_an_option(model, output):
    example("option").test_it_is_checked(model, output)
