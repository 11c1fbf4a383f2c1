"""Reads and checks records from data files: conversations and texts, each with its file and line.

How a file is read follows from the end of its name: .json, .jsonl and .ndjson hold records, as one JSON list or as one
object per line; any other file is one text. A record is a conversation under "conversations" (ShareGPT: `from`,
`value`) or "messages" (OpenAI: `role`, `content`), or a "text".

Texts can also come from Python: `data.files=python:MODULE.FUNCTION` calls function(held_out), which returns name ->
text of its training part or of its held-out part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import io
import json
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

from etils import epath

from kangaroo_jax.errors import InputError

_FUNCTION = "python:"
_RECORD_FILES = (".json", ".jsonl", ".ndjson")
# Longer texts are split into several records, because a batch reads complete records.
_TEXT_CHARACTERS = 32_768

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "assistant", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function"), "tool"),
}


class BadRecord(Exception):
    """A record that cannot be trained on, with the reason. It is skipped, counted and listed."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A file of data, or the text of one.

    Attributes:
      name: for messages.
      path: the file; None if the contents are `text`.
      text: the contents, if they are not in a file.
    """

    name: str
    path: epath.Path | None = None
    text: str = ""

    @property
    def holds_records(self) -> bool:
        return self.name.lower().endswith(_RECORD_FILES)

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Opens it for reading bytes. Errors while it is read become `InputError`."""
        if self.path is None:
            yield io.BytesIO(self.text.encode())
            return
        with _readable(self.name), self.path.open("rb") as file:
            yield file


class Place(NamedTuple):
    """Where a record is: index of its source, its line (from 1), and its number in a JSON list (from 0; else -1)."""

    source: int
    line: int
    item: int = -1

    def describe(self, sources: Sequence[Source]) -> str:
        return f"{sources[self.source].name}:{self.line}" + (f" (item {self.item})" if self.item >= 0 else "")


class Turn(NamedTuple):
    role: str  # system, user, assistant or tool
    text: str


@dataclasses.dataclass(frozen=True)
class Conversation:
    turns: tuple[Turn, ...]


@dataclasses.dataclass(frozen=True)
class Text:
    """A text, or a part of a long text: `begins` (`ends`) says whether it is the first (last) part."""

    text: str
    begins: bool = True
    ends: bool = True


class Entry(NamedTuple):
    """A record. `content` is what to learn from, None if there is nothing (an empty text, a conversation without an
    answer), or why the record cannot be used. `read` is the share of the source that has been read so far."""

    place: Place
    content: Conversation | Text | BadRecord | None
    read: float


def find_sources(files: str, held_out: bool = False) -> list[Source]:
    """The sources that `files` names, sorted within each pattern, each file once.

    Args:
      files: paths, globs or gs:// paths separated by commas, or python:MODULE.FUNCTION.
      held_out: of a function, the part that is kept for evaluation; no effect on files.

    Raises:
      InputError: for no patterns, one that matches no file, or a function that cannot be imported.
    """
    if is_function(files):
        texts = _function(files)(held_out)
        return [Source(f"{files.strip().removeprefix(_FUNCTION)}/{name}", text=text) for name, text in texts.items()]
    patterns = [pattern.strip() for pattern in files.split(",") if pattern.strip()]
    if not patterns:
        raise InputError("data.files: empty; expected paths or globs of text or JSON files, separated by commas")
    sources = {}
    for pattern in patterns:
        matches = _matches(pattern)
        if not matches:
            raise InputError(f"{pattern}: no such file; expected paths or globs of text or JSON files")
        sources |= {str(path): Source(str(path), path) for path in matches}
    return list(sources.values())


def is_function(files: str) -> bool:
    """Whether `files` names a function, which has a held-out part of its own, rather than files."""
    return files.strip().startswith(_FUNCTION)


def check_sources(files: str) -> None:
    """Raises `InputError` for patterns that match nothing or a function that cannot be imported; reads no data."""
    if is_function(files):
        _function(files)
    else:
        find_sources(files)


def _function(files: str) -> Callable[[bool], Mapping[str, str]]:
    try:
        found = pkgutil.resolve_name(files.strip().removeprefix(_FUNCTION))
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"data.files: {files}: cannot be imported ({error}); expected python:MODULE.FUNCTION"
        ) from None
    if not callable(found):
        raise InputError(f"data.files: {files}: a {type(found).__name__}; expected python:MODULE.FUNCTION")
    return found


def _matches(pattern: str) -> list[epath.Path]:
    with _readable(pattern):
        if "://" not in pattern:
            found = [epath.Path(match) for match in glob.glob(str(epath.Path(pattern).expanduser()), recursive=True)]
        elif not glob.has_magic(pattern):
            found = [epath.Path(pattern)]
        else:
            parts = pattern.split("/")
            first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
            found = list(epath.Path("/".join(parts[:first])).glob("/".join(parts[first:])))
        return sorted(path for path in found if path.is_file())


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turns a file system's errors about `name` into `InputError`."""
    try:
        yield
    except InputError:
        raise
    except ImportError as error:  # fsspec without the package for this kind of storage
        raise InputError(f"{name}: {error} (for gs://: pip install gcsfs)") from None
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror or error})") from None
    except Exception as error:
        if "://" not in name:
            raise
        # A bucket's client raises exceptions of its own for a wrong name, missing permission or no network.
        raise InputError(f"{name}: cannot be read ({type(error).__name__}: {error})") from None


def read_records(sources: Sequence[Source]) -> Iterator[Entry]:
    """All records of `sources`, good and bad, in order.

    Raises:
      InputError: for a file that cannot be read, or a broken JSON list, of which the rest cannot be parsed.
    """
    for index, source in enumerate(sources):
        with source.open() as file:
            if not source.holds_records:
                yield from _text_file(file.read(), index)
                continue
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            if _first_character(file) == b"[":
                file.seek(0)
                yield from _json_list(file.read(), index, source.name)
            else:
                file.seek(0)
                yield from _json_lines(file, index, size)


def _first_character(file: BinaryIO) -> bytes:
    for line in file:
        if stripped := line.removeprefix(b"\xef\xbb\xbf").strip():
            return stripped[:1]
    return b""


def _text_file(data: bytes, source: int) -> Iterator[Entry]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 text ({error.reason} at byte {error.start})"
        yield Entry(Place(source, data.count(b"\n", 0, error.start) + 1), BadRecord(reason), 1.0)
        return
    yield from _text_entries(io.StringIO(text, newline=None).read(), Place(source, 1), 1.0, lines=True)


def _text_entries(text: str, place: Place, read: float, lines: bool = False) -> Iterator[Entry]:
    """A text as one entry, or a long one as several, cut at line ends. `lines`: the text is a file, so the places of
    later parts have later lines."""
    if not text.strip():
        yield Entry(place, None, read)
        return
    start = 0
    while start < len(text):
        end = len(text)
        if end - start > _TEXT_CHARACTERS:
            end = text.rfind("\n", start, start + _TEXT_CHARACTERS) + 1 or start + _TEXT_CHARACTERS
        yield Entry(place, Text(text[start:end], begins=start == 0, ends=end == len(text)), read)
        if lines:
            place = place._replace(line=place.line + text.count("\n", start, end))
        start = end


def _json_lines(file: BinaryIO, source: int, size: int) -> Iterator[Entry]:
    done = 0
    for number, line in enumerate(file, 1):
        done += len(line)
        place, read = Place(source, number), done / size
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not line.strip():
            continue
        try:
            value, duplicate = _Parser().parse(line.decode("utf-8").strip(" \t\r\n"))
            content = _content(value, duplicate)
        except UnicodeDecodeError as error:
            content = BadRecord(f"not UTF-8 text ({error.reason} at byte {error.start} of the line)")
        except json.JSONDecodeError as error:
            content = BadRecord(f"not valid JSON ({error.msg} at column {error.colno}); expected one object per line")
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; too many nested brackets
            content = BadRecord(f"not valid JSON ({error})")
        except BadRecord as error:
            content = error
        yield from _entries(place, content, read)


def _json_list(data: bytes, source: int, name: str) -> Iterator[Entry]:
    """The items of a JSON list, parsed one at a time: `json.loads` of the complete list would need several times the
    file's size in memory, and would not give the line of each item."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{name}:{line}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    del data
    parser, line, item = _Parser(), 1, 0
    counted = 0  # lines are counted up to here

    def skip(at: int) -> int:
        return json.decoder.WHITESPACE.match(text, at).end()

    def broken(at: int, reason: str) -> InputError:
        at = min(at, len(text))
        place = f"{name}:{line + text.count(chr(10), counted, at)}"
        return InputError(
            f"{place}: not valid JSON ({reason} at column {at - text.rfind(chr(10), 0, at)}, in or after item {item}); "
            "the rest of the list cannot be read: fix it, or write one object per line"
        )

    position = skip(skip(0) + 1)
    while not text.startswith("]", position):
        line, counted = line + text.count("\n", counted, position), position
        place = Place(source, line, item)
        try:
            (value, duplicate), end = parser.parse_at(text, position)
        except json.JSONDecodeError as error:
            raise broken(error.pos, error.msg) from None
        except (ValueError, RecursionError) as error:
            raise broken(position, str(error)) from None
        try:
            content = _content(value, duplicate)
        except BadRecord as error:
            content = error
        yield from _entries(place, content, end / len(text))
        position = skip(end)
        if text.startswith(",", position):
            position = skip(position + 1)
            if text.startswith("]", position):
                raise broken(position, "a comma before the end of the list")
        elif not text.startswith("]", position):
            raise broken(position, "expected ',' or ']'")
        item += 1
    if (end := skip(position + 1)) != len(text):
        raise broken(end, "text after the list")


class _Parser:
    """Python's JSON decoder, with a hook that notes keys given twice: the decoder alone silently takes the last."""

    def __init__(self):
        self._duplicate: str | None = None
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            keys = [key for key, _ in pairs]
            self._duplicate = next(key for key in keys if keys.count(key) > 1)
        return made

    def parse(self, text: str) -> tuple[Any, str | None]:
        """The value, and a key that one of its objects has twice, or None."""
        self._duplicate = None
        return self._decoder.decode(text), self._duplicate

    def parse_at(self, text: str, position: int) -> tuple[tuple[Any, str | None], int]:
        """The same for the value that starts at `position`, and where it ends."""
        self._duplicate = None
        value, end = self._decoder.raw_decode(text, position)
        return (value, self._duplicate), end


def _entries(place: Place, content: Conversation | str | BadRecord | None, read: float) -> Iterator[Entry]:
    if isinstance(content, str):
        yield from _text_entries(content, place, read)
    else:
        yield Entry(place, content, read)


def _content(record: Any, duplicate: str | None) -> Conversation | str | None:
    """The content of a parsed record; raises `BadRecord`."""
    if duplicate is not None:
        raise BadRecord(f'the key "{duplicate}" is there twice')
    if isinstance(record, dict):
        for key, role, text in (("conversations", "from", "value"), ("messages", "role", "content")):
            if key in record:
                return _conversation(record[key], key, role, text)
        if isinstance(record.get("text"), str):
            return _unicode(record["text"], '"text"')
    found = f"keys {', '.join(sorted(record)) or 'none'}" if isinstance(record, dict) else type(record).__name__
    raise BadRecord(f'expected an object with "conversations", "messages" or a string under "text", found {found}')


def _conversation(turns: Any, key: str, role_key: str, text_key: str) -> Conversation | None:
    if not isinstance(turns, list):
        raise BadRecord(f'expected a list under "{key}", found {type(turns).__name__}')
    read = []
    for number, turn in enumerate(turns):
        where = f"turn {number} of {key}"
        if not isinstance(turn, dict):
            raise BadRecord(f"{where}: expected an object, found {type(turn).__name__}")
        role = turn.get(role_key)
        if not isinstance(role, str) or role.lower() not in _ROLES:
            raise BadRecord(f'{where}: expected a role under "{role_key}" ({", ".join(_ROLES)}), found {role!r}')
        if turn.get("tool_calls") or turn.get("function_call"):
            raise BadRecord(f"{where}: a tool call; only text can be trained on")
        text = turn.get(text_key)
        if isinstance(text, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in text):
            text = "".join(str(part.get("text", "")) for part in text)  # OpenAI's content parts
        if not isinstance(text, str):
            raise BadRecord(f'{where}: expected a string under "{text_key}", found {type(text).__name__}')
        read.append(Turn(_ROLES[role.lower()], _unicode(text, where)))
    return Conversation(turns) if (turns := tidy(read)) else None


def tidy(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """The turns that there is something to learn from, in the shape that chat templates expect.

    Empty turns are left out, as are the assistant's before the first of a user (they answer nothing) and all after
    the assistant's last. Consecutive turns of one role become one, with a blank line between.
    """
    kept: list[Turn] = []
    asked = False
    for turn in turns:
        if not turn.text.strip() or (turn.role == "assistant" and not asked):
            continue
        asked = asked or turn.role == "user"
        if kept and kept[-1].role == turn.role:
            kept[-1] = Turn(turn.role, f"{kept[-1].text}\n\n{turn.text}")
        else:
            kept.append(turn)
    while kept and kept[-1].role != "assistant":
        kept.pop()
    return tuple(kept)


def _unicode(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half an emoji, written as an escape
        raise BadRecord(f"{where} is not valid Unicode (character {error.start})") from None
    return text
