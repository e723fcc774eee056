"""Exceptions of streamprune. Each message names the thing, the values and the remedy, on one line."""


class StreampruneError(Exception):
    """Base of all errors: something could not be done. The command line prints the message, exits with `exit_code`."""

    exit_code = 1


class UsageError(StreampruneError):
    """An option, or a combination of options, that cannot be meant."""

    exit_code = 2


class CheckpointError(StreampruneError):
    """The checkpoint is missing, damaged, or not of a kind that streamprune reads."""


class KernelError(StreampruneError):
    """A kernel cannot be compiled or started on the device, or there are none."""


class CalibrationError(StreampruneError):
    """The text is missing, unreadable or too short."""


class TaskError(StreampruneError):
    """A task's data is missing or unreadable, or it asks for what a streamed model does not do."""


class OutputError(StreampruneError):
    """The output cannot be written."""


class JournalError(OutputError):
    """A journal is damaged: no run can go on from it."""
