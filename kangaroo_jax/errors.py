"""The one exception for what a user can mend."""


class InputError(ValueError):
    """A file, flag or setting that a user gave is wrong. The message is one line: what, found, expected, the mend.

    The scripts print it and exit with code 2; anything else that is raised is a bug and keeps its traceback.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))  # one line, whatever a file's name or contents held
