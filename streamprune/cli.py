"""The command line. The only place that turns errors into messages and exit codes.

Neither this file nor one of `commands/` imports torch or transformers before a command needs them: they take seconds,
and help and the refusal of an option none.
"""

from __future__ import annotations

import io
import json
import re
import signal
import sys
import traceback
import warnings
from typing import Any, NoReturn

import click
from click.core import ParameterSource

from streamprune.commands.compare import compare_command
from streamprune.commands.demo import demo_command
from streamprune.commands.evaluate import evaluate_command
from streamprune.commands.export import export_command
from streamprune.commands.methods import methods_command
from streamprune.commands.options import COMPUTE_OPTIONS, PRUNE_OPTIONS, with_options
from streamprune.commands.plan import plan_command
from streamprune.commands.prune import run_prune
from streamprune.commands.recover import recover_command
from streamprune.commands.report import report_command
from streamprune.commands.speed import speed_command
from streamprune.commands.verify import verify_command
from streamprune.errors import StreampruneError, UsageError


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="streamprune")
@with_options(PRUNE_OPTIONS + COMPUTE_OPTIONS)
@click.option("--report", is_flag=True, help="Write report.html into the output too: the run on a page.")
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
    run_prune(**options)


_OF_OUTPUTS = (evaluate_command, verify_command, export_command, compare_command, report_command, speed_command)
for _command in (plan_command, recover_command, *_OF_OUTPUTS, methods_command, demo_command):
    cli.add_command(_command)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a command in this process: one line for an error, exit code 0 done, 1 could not be done, 2 usage."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug, as_json = "--debug" in arguments, "--json-progress" in arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path need not be text
    if not debug:
        # transformers' and torch's notes on their own future are not about the user's run.
        warnings.filterwarnings("ignore")
    interrupted = []

    def interrupt(number: int, frame: Any) -> None:
        interrupted.append(number)  # a library may put an error of its own in the place of this one
        signal.default_int_handler(number, frame)

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, interrupt)}  # what batch schedulers send is as Ctrl-C
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell lets its background jobs ignore it
        before[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
    try:
        code = cli.main(arguments, prog_name="streamprune", standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:
        code = _answer(error, bool(interrupted), debug, as_json)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    sys.exit(code if isinstance(code, int) else 0)


def _answer(error: BaseException, interrupted: bool, debug: bool, as_json: bool) -> int:
    """Say in a line what ended a command, and return the exit code; what nobody has foreseen is raised again."""
    if interrupted or isinstance(error, KeyboardInterrupt | click.Abort):
        said = str(error) if isinstance(error, click.Abort) else ""
        return _fail(f"interrupted; {said or 'no output was written'}", 1, debug, as_json)
    if isinstance(error, click.ClickException) and not as_json:
        error.show()
        return 2
    if isinstance(error, click.ClickException):
        return _fail(error.format_message(), 2, debug, as_json)
    if isinstance(error, StreampruneError):
        return _fail(str(error), error.exit_code, debug, as_json)
    if isinstance(error, MemoryError | RuntimeError) and _is_out_of_memory(error):
        return _fail(_out_of_memory(error), 1, debug, as_json)
    if isinstance(error, OSError):
        return _fail(f"{error.filename or 'system'}: {error.strerror or error}", 1, debug, as_json)
    raise error


def _is_out_of_memory(error: Exception) -> bool:
    """torch says so with a class of its own on a GPU, and only in the text on a CPU."""
    of_torch = getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError)
    return isinstance(error, MemoryError | of_torch) or "DefaultCPUAllocator" in str(error)


def _out_of_memory(error: Exception) -> str:
    """Say where memory ran out, by the notes of the pager and the stage, and what torch says was wanted and is free."""
    where = " of ".join(getattr(error, "__notes__", []))
    sizes = [re.search(rf"{what} ([\d.]+ \w+)", str(error)) for what in ("Tried to allocate", "of which")]
    wanted, free = (None if size is None else size[1] for size in sizes)
    asked = f": {wanted} were asked for" + (f", {free} are free" if free else "") if wanted else ""
    budget = ", or raise --gpu-memory" if "CUDA" in str(error) else ""
    return f"out of memory{' in ' + where if where else ''}{asked}; lower --micro-batch or --samples{budget}"


def _fail(message: str, code: int, debug: bool, as_json: bool) -> int:
    message = " ".join(message.split())
    trace = traceback.format_exc() if debug else ""
    if as_json:
        event = {"event": "error", "message": message} | ({"traceback": trace} if debug else {})
        click.echo(json.dumps(event), err=True)
    else:
        click.echo(f"{trace}streamprune: {message}", err=True)
    return code
