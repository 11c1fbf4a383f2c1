"""Exceptions that the user sees as one line."""


class InputError(ValueError):
    """A file, flag or setting that a user gave is wrong. The message is one line: what is wrong, what was found, what
    was expected, how to fix it.

    The commands print it and exit with code 2; any other exception is a bug and keeps its traceback.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))  # one line, whatever a file's name or contents held


class MachineError(RuntimeError):
    """The request is right, but this machine, another one of the run, or the type of its numbers cannot do it. One
    line, as above; the commands exit with code 1."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def one_line(error: BaseException) -> str:
    """The first line of what a library said, or its exception's name where it said nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
