"""A `Report` that keeps what it is told."""

import contextlib


class Said:
    """Lines, and how far each bar got, of how much."""

    def __init__(self):
        self.lines, self.bars = [], {}

    def say(self, message):
        assert "\n" not in message
        self.lines.append(message)

    @contextlib.contextmanager
    def bar(self, description, total, unit="", done=0):
        self.bars[description] = (done, total)

        class Bar:
            def show(_, done, note=""):
                self.bars[description] = (done, total)

        yield Bar()

    @property
    def text(self):
        return "".join(f"{line}\n" for line in self.lines)
