"""A conversation in the terminal."""

from __future__ import annotations

import contextlib
import re
import signal
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from kangaroo_jax.cli.answer import TextPrinter
from kangaroo_jax.engine.conversation import Conversation
from kangaroo_jax.engine.requests import Answer, Finished, Request
from kangaroo_jax.errors import InputError

if TYPE_CHECKING:
    from kangaroo_jax.engine.engine import Engine

COMMANDS = "/reset forgets the conversation, /exit or the end of input leaves, Ctrl-C ends an answer"
_COMMAND = re.compile(r"/\w+")


def chat(
    engine: Engine,
    conversation: Conversation,
    request: Callable[[list[int]], Request],
    printer: Callable[[Sequence[int]], TextPrinter],
) -> None:
    """Reads turns from standard input and prints the answers, until /exit or the end of input.

    Args:
      engine: with one slot, which keeps what the next turn begins with.
      conversation: that the turns are added to.
      request: a turn's request, from the prompt's token ids.
      printer: of an answer, from the prompt's token ids.
    """
    while True:
        try:
            text = _read_turn()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # a line that was begun is dropped
            print(f"\n({COMMANDS})")
            continue
        except UnicodeDecodeError as error:
            _say(f"standard input: not UTF-8 (byte {error.start})")
            continue
        if text == "/exit":
            return
        if text == "/reset":
            conversation.reset()
            print("(the conversation begins again)\n")
        elif _COMMAND.fullmatch(text):
            print(f"(unknown command {text}; {COMMANDS})\n")
        elif text:
            with _interrupts() as interrupted:
                try:
                    ids = conversation.ask(text)
                except InputError as error:
                    _say(f"{error}; /reset begins a new conversation" if conversation.has_turns else str(error))
                    continue
                _answer(engine, conversation, request(ids), printer(ids), interrupted)


def _read_turn() -> str:
    """A line of standard input; raises `EOFError` at its end."""
    if sys.stdin is None or sys.stdin.closed:
        raise EOFError
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - input() edits lines with it
        return input("> ").strip()
    line = sys.stdin.buffer.readline()  # as text, a line that is no UTF-8 would take those behind it with it
    if not line:
        raise EOFError
    text = line.decode().strip()
    print(f"> {text}")
    return text


def _answer(
    engine: Engine,
    conversation: Conversation,
    request: Request,
    printer: TextPrinter,
    interrupted: Callable[[], bool],
) -> None:
    """Prints the answer to the last turn, and adds it to the conversation; after Ctrl-C as far as it had come."""
    text, tokens, answer = "", [], None
    id = engine.add(request)
    while answer is None and not interrupted():
        for event in engine.step():
            if isinstance(event, Finished):
                answer = event.answer
            else:
                printer.feed(event)
                text, tokens = text + event.text, [*tokens, *event.tokens]
    if answer is None:
        engine.abort(id)
        printer.interrupt()
        print("\n[ended by Ctrl-C]\n")
        # Text may be held back that could begin a stop string, or a character.
        conversation.answered(tokens, text, complete=False)
        return
    printer.finish(answer)
    if answer.error is not None:
        print()
        _say(answer.error)
        conversation.answered(answer.tokens, answer.text)
        return
    print(f"\n[{_summary(answer)}]\n")
    conversation.answered(answer.tokens, answer.text, complete=answer.finish_reason != "stop")


def _summary(answer: Answer) -> str:
    count = len(answer.tokens)
    drafted = any(answer.draft_lengths) or any(answer.lookup_lengths)
    accept = f"accept length {statistics.fmean(answer.accept_lengths):.2f}, " if drafted else ""
    ended = "; ended at the limit" if answer.finish_reason == "length" else ""
    return f"{count} tokens, {accept}{count / answer.seconds:.1f} tokens/s{ended}"


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Keeps Ctrl-C from ending the program, and says whether there was one: at any place but between steps it would
    leave the engine without the arrays that a step takes and gives. A second one ends the program."""
    count = 0

    def note(*_: object) -> None:
        nonlocal count
        count += 1
        if count > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: count > 0
    finally:
        signal.signal(signal.SIGINT, before)


def _say(message: str) -> None:
    sys.stdout.flush()
    print(f"({message})\n", file=sys.stderr, flush=True)
