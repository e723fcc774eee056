"""The command `streamprune`, also as `python -m streamprune`."""

import os
import sys
from typing import NoReturn

from streamprune.cli import main


def command() -> NoReturn:
    """Run `main` and end the process with its exit code.

    The interpreter is not taken down: with torch that takes a second, and it waits for every thread, of which one may
    wait for a lock that Ctrl-C came upon and left held. Whatever has to be written or removed has been by now.
    """
    try:
        main()
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)


if __name__ == "__main__":
    command()
