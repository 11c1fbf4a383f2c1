"""The exceptions that are one line to the user."""


class InputError(ValueError):
    """A file, flag or setting that a user gave is wrong. The message is one line: what, found, expected, the mend.

    The scripts print it and exit with code 2; anything else that is raised is a bug and keeps its traceback.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))  # one line, whatever a file's name or contents held


class MachineError(RuntimeError):
    """What was asked for is right, but the machine or its neighbours do not allow it. One line, as above; the scripts
    exit with code 1."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def one_line(error: BaseException) -> str:
    """The first line of what a library said, or its exception's name where it said nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
