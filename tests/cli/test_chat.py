"""The conversation in the terminal, with an engine that answers as it is told."""

import io
import signal

import pytest

from kangaroo_jax.cli.chat import chat
from kangaroo_jax.engine.requests import Answer, Finished, TextDelta


class Talk:
    """Takes the place of engine, conversation and printer. `at`: the call during which Ctrl-C is pressed."""

    def __init__(self, at=None):
        self.at, self.asked, self.aborted, self.taken = at, [], [], []

    def _call(self, name):
        if name == self.at:
            self.at = None
            signal.raise_signal(signal.SIGINT)

    def ask(self, text):
        self._call("ask")
        self.asked.append(text)
        return [1]

    def add(self, ids):
        self._call("add")
        return len(self.asked)

    def step(self):
        self._call("step")
        id = len(self.asked)
        answer = Answer(id, [5, 6], "ab", [1], [0], "eos", 0.0, 1.0)
        return [TextDelta(id, "a", [5]), Finished(id, answer)]

    def abort(self, id):
        self.aborted.append(id)

    def answered(self, tokens, text, complete=True):
        self.taken.append((list(tokens), text, complete))

    def feed(self, event):
        pass

    def interrupt(self):
        pass

    def finish(self, answer):
        pass


def run(monkeypatch, talk, said):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(said), encoding="utf-8"))
    chat(talk, talk, lambda ids: ids, lambda ids: talk)


@pytest.mark.parametrize("at", ["ask", "add"])
def test_ctrl_c_before_an_answer_begins_ends_that_answer_alone(monkeypatch, capsys, at):
    talk = Talk(at)
    run(monkeypatch, talk, b"one\ntwo\n/exit\n")
    assert talk.asked == ["one", "two"]
    assert (talk.aborted, talk.taken) == ([1], [([], "", False), ([5, 6], "ab", True)])
    assert "[ended by Ctrl-C]" in capsys.readouterr().out


def test_an_interrupted_answer_is_not_taken_for_all_of_its_tokens(monkeypatch):
    """Some of their text may be held back: the next prompt is made of the text that was shown."""
    talk = Talk()

    def step():
        signal.raise_signal(signal.SIGINT)
        return [TextDelta(1, "a", [5, 6])]

    talk.step = step
    run(monkeypatch, talk, b"one\n")
    assert talk.taken == [([5, 6], "a", False)]


def test_a_line_that_is_not_utf_8_is_named_and_the_next_one_read(monkeypatch, capsys):
    talk = Talk()
    run(monkeypatch, talk, b"caf\xe9\nhello\n")
    assert talk.asked == ["hello"]
    assert "standard input: not UTF-8 (byte 3)" in capsys.readouterr().err
