"""Reads and checks records from data files: conversations and texts, each with its file and line.

How a file is read follows from the end of its name: .json, .jsonl and .ndjson hold records, as one JSON list, as one
object per line or as objects over several lines; any other file is one text. A record is a conversation under
"conversations", "conversation" or "messages" (turns of `from` and `value`, as ShareGPT, or of `role` and `content`, as
OpenAI), a "prompt" with its "completion", or a "text". What a target wrote itself (data/synthesize/) also says with
which tokens.

Texts can also come from Python: `data.files=python:MODULE.FUNCTION` calls function(held_out), which returns name ->
text of its training part or of its held-out part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import io
import json
import pathlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

from kangaroo_jax import json_text, paths
from kangaroo_jax.buckets import Bucket, is_bucket, matching
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

# Fields that change what is to be learned, by the names that other tools give them.
_SYSTEM = ("system", "system_prompt")  # of a record
_REASONING = ("reasoning_content", "reasoning", "thinking")  # of a turn
_LOSS = ("loss", "weight", "train", "loss_mask")  # of a turn or a record


class BadRecord(Exception):
    """A record that cannot be trained on, with the reason. It is skipped, counted and listed."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A file of data, or the text of one.

    Attributes:
      name: for messages.
      path: the file; None if it is in a bucket, or the contents are `text`.
      text: the contents, if they are not in a file.
      stored: bytes of the object in a bucket that `name` is the location of.
    """

    name: str
    path: pathlib.Path | None = None
    text: str = ""
    stored: int | None = None

    @property
    def size(self) -> int:
        """Bytes; of a text, characters."""
        if self.stored is not None:
            return self.stored
        return len(self.text) if self.path is None else self.path.stat().st_size

    @property
    def holds_records(self) -> bool:
        return self.name.lower().endswith(_RECORD_FILES)

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Opens it for reading bytes. Errors while it is read become `InputError`."""
        if self.stored is not None:
            bucket, name = Bucket(self.name).parent
            with _readable(self.name), bucket.open(name) as file:
                yield file
        elif self.path is None:
            yield io.BytesIO(self.text.encode())
        else:
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
    learned: bool = True  # whether an assistant's turn counts in the loss


@dataclasses.dataclass(frozen=True)
class Spelling:
    """The tokens that a target wrote a record with: text does not always become the same ones again.

    Attributes:
      tokenizer: which one's they are (`checkpoint.tokenizer.vocabulary_digest`).
      template: the chat template, as `data.template` names it.
      ids: all tokens.
      learned: [start, end) of those that count in the loss.
    """

    tokenizer: str
    template: str
    ids: tuple[int, ...]
    learned: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Conversation:
    turns: tuple[Turn, ...]
    spelling: Spelling | None = None


@dataclasses.dataclass(frozen=True)
class Text:
    """A text, or a part of a long text: `begins` (`ends`) says whether it is the first (last) part. Its first `prompt`
    characters do not count in the loss."""

    text: str
    begins: bool = True
    ends: bool = True
    prompt: int = 0
    spelling: Spelling | None = None


Content = Conversation | Text | str | None  # a string is a text that may be long
Parse = Callable[[Any], Content]


class Entry(NamedTuple):
    """A record. `content` is what to learn from, None if there is nothing (an empty text, a conversation without an
    answer), or why the record cannot be used. `read` is the share of the source that has been read so far."""

    place: Place
    content: Conversation | Text | BadRecord | None
    read: float


def find_sources(files: str, held_out: bool = False) -> list[Source]:
    """The sources that `files` names, sorted within each pattern, each file once.

    Args:
      files: paths, globs, gs:// or s3:// paths separated by commas, or python:MODULE.FUNCTION.
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
        sources |= {source.name: source for source in matches}
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


def _matches(pattern: str) -> list[Source]:
    if is_bucket(pattern):
        return [Source(url, stored=size) for url, size in matching(pattern).items()]
    with _readable(pattern):
        found = [pathlib.Path(match) for match in glob.glob(str(paths.expanded(pattern)), recursive=True)]
        return [Source(str(path), path) for path in sorted(found) if path.is_file()]


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turns a file system's errors about `name` into `InputError`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror or error})") from None


def read_records(sources: Sequence[Source], parse: Parse | None = None) -> Iterator[Entry]:
    """All records of `sources`, good and bad, in order.

    Args:
      sources: from `find_sources`.
      parse: what there is to learn from in a record, a JSON value; `learned` by default.

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
            first = _first_line(file)
            file.seek(0)
            if first.startswith(b"["):
                yield from _json_values(file.read(), index, source.name, parse or learned, in_list=True)
            elif _is_cut(first) and _begins_with_an_object(text := file.read()):
                yield from _json_values(text, index, source.name, parse or learned, in_list=False)
            else:
                file.seek(0)
                yield from _json_lines(file, index, size, parse or learned)


def _first_line(file: BinaryIO) -> bytes:
    """The first line with anything on it."""
    return next(filter(None, (line.removeprefix(b"\xef\xbb\xbf").strip() for line in file)), b"")


def _is_cut(line: bytes) -> bool:
    """Whether a line begins an object that it does not end."""
    try:
        json_text.parse(line)
    except (ValueError, RecursionError):
        return line.startswith(b"{")
    return False


def _begins_with_an_object(data: bytes) -> bool:
    try:
        text = data.decode("utf-8-sig")
        json.JSONDecoder().raw_decode(text, json.decoder.WHITESPACE.match(text, 0).end())
    except (ValueError, RecursionError):
        return False
    return True


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


def _json_lines(file: BinaryIO, source: int, size: int, parse: Parse) -> Iterator[Entry]:
    done = 0
    for number, line in enumerate(file, 1):
        done += len(line)
        place, read = Place(source, number), done / size
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not line.strip():
            continue
        try:
            value, duplicate = _Parser().parse(line.decode("utf-8").strip(" \t\r\n"))
            content = _content(value, duplicate, parse)
        except UnicodeDecodeError as error:
            content = BadRecord(f"not UTF-8 text ({error.reason} at byte {error.start} of the line)")
        except json.JSONDecodeError as error:
            content = BadRecord(f"not valid JSON ({error.msg} at column {error.colno}); expected one object per line")
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; too many nested brackets
            content = BadRecord(f"not valid JSON ({error})")
        except BadRecord as error:
            content = error
        yield from _entries(place, content, read)


def _json_values(data: bytes, source: int, name: str, parse: Parse, *, in_list: bool) -> Iterator[Entry]:
    """The items of a JSON list, or objects one after another, parsed one at a time: `json.loads` of the complete list
    would need several times the file's size in memory, and would not give the line of each item."""
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
            f"the rest of the {'list' if in_list else 'file'} cannot be read: fix it, or write one object per line"
        )

    def ended() -> bool:
        return text.startswith("]", position) if in_list else position == len(text)

    position = skip(skip(0) + 1) if in_list else skip(0)
    while not ended():
        line, counted = line + text.count("\n", counted, position), position
        place = Place(source, line, item)
        try:
            (value, duplicate), end = parser.parse_at(text, position)
        except json.JSONDecodeError as error:
            raise broken(error.pos, error.msg) from None
        except (ValueError, RecursionError) as error:
            raise broken(position, str(error)) from None
        try:
            content = _content(value, duplicate, parse)
        except BadRecord as error:
            content = error
        yield from _entries(place, content, end / len(text))
        position = skip(end)
        if not in_list:
            pass
        elif text.startswith(",", position):
            position = skip(position + 1)
            if text.startswith("]", position):
                raise broken(position, "a comma before the end of the list")
        elif not text.startswith("]", position):
            raise broken(position, "expected ',' or ']'")
        item += 1
    if in_list and (end := skip(position + 1)) != len(text):
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


def _entries(place: Place, content: Conversation | Text | str | BadRecord | None, read: float) -> Iterator[Entry]:
    if isinstance(content, str):
        yield from _text_entries(content, place, read)
    else:
        yield Entry(place, content, read)


def _content(record: Any, duplicate: str | None, parse: Parse) -> Content:
    if duplicate is not None:
        raise BadRecord(f'the key "{duplicate}" is there twice')
    return parse(record)


def learned(record: Any) -> Content:
    """What there is to learn from in a record, None if nothing; raises `BadRecord`."""
    if isinstance(record, dict):
        if (key := _turns_key(record)) is not None:
            return _conversation(record, key)
        if isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
            return _completion(record)
        if isinstance(record.get("text"), str):
            return _unicode(record["text"], '"text"')
    found = f"keys {', '.join(sorted(record)) or 'none'}" if isinstance(record, dict) else type(record).__name__
    raise BadRecord(
        'expected an object with "conversations", "messages", "prompt" and "completion", or a string under "text", '
        f"found {found}"
    )


def asked(record: Any) -> Content:
    """The turns of a system and of users in a record, None if no user has any; raises `BadRecord`. The answers that are
    there separate them, and are left out. A "prompt" is a user's only turn."""
    if isinstance(record, dict):
        if (key := _turns_key(record)) is not None:
            turns = tuple(turn for turn in _joined(_turns(record, key)) if turn.role != "assistant")
            if "tool" in (turn.role for turn in turns):
                raise BadRecord("a tool's turn, which cannot be answered again")
            if any(turn.role == "system" for turn in turns[1:]):
                raise BadRecord("a system's turn after the first turn")
            return Conversation(turns) if turns and turns[-1].role == "user" else None
        if isinstance(record.get("prompt"), str):
            text = _unicode(record["prompt"], '"prompt"')
            return Conversation((Turn("user", text),)) if text.strip() else None
    found = f"keys {', '.join(sorted(record)) or 'none'}" if isinstance(record, dict) else type(record).__name__
    raise BadRecord(f'expected an object with "prompt", "messages" or "conversations", found {found}')


def _turns_key(record: dict[str, Any]) -> str | None:
    return next((key for key in ("conversations", "messages", "conversation") if key in record), None)


def _completion(record: dict[str, Any]) -> Text | None:
    prompt, completion = (_unicode(record[key], f'"{key}"') for key in ("prompt", "completion"))
    return Text(prompt + completion, prompt=len(prompt), spelling=_spelling(record)) if completion else None


def _conversation(record: dict[str, Any], key: str) -> Conversation | None:
    turns = tidy(_turns(record, key))
    if not _learned(record, "the record") or not any(turn.learned for turn in turns if turn.role == "assistant"):
        return None
    return Conversation(turns, _spelling(record))


def _turns(record: dict[str, Any], key: str) -> list[Turn]:
    """All turns of a record as they are there, with its system text before them."""
    turns = record[key]
    if not isinstance(turns, list):
        raise BadRecord(f'expected a list under "{key}", found {type(turns).__name__}')
    for name in ("tools", "functions"):
        if record.get(name) not in (None, "", [], "[]"):
            raise BadRecord(f'"{name}": a conversation with tools; only text can be trained on')
    read = [_turn(turn, key, f"turn {number} of {key}") for number, turn in enumerate(turns)]
    if system := _system(record):
        if read and read[0].role == "system" and read[0].text != system:
            raise BadRecord(f"a system text of the record, and another one as turn 0 of {key}; keep one")
        read = [Turn("system", system), *read[bool(read) and read[0].role == "system" :]]
    return read


def _turn(turn: Any, key: str, where: str) -> Turn:
    if not isinstance(turn, dict):
        raise BadRecord(f"{where}: expected an object, found {type(turn).__name__}")
    names = (("from", "value"), ("role", "content"))
    role_key, text_key = next((pair for pair in names if pair[0] in turn), names[key == "messages"])
    role = turn.get(role_key)
    if not isinstance(role, str) or role.lower() not in _ROLES:
        raise BadRecord(f'{where}: expected a role under "{role_key}" ({", ".join(_ROLES)}), found {role!r}')
    if turn.get("tool_calls") or turn.get("function_call"):
        raise BadRecord(f"{where}: a tool call; only text can be trained on")
    for name in _REASONING:
        if turn.get(name):
            raise BadRecord(
                f'{where}: only what is under "{text_key}" can be trained on, found "{name}" as well; put it there, '
                "marked as the target marks it"
            )
    text = turn.get(text_key)
    if isinstance(text, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in text):
        parts = [part.get("text") for part in text]  # OpenAI's content parts
        wrong = [part for part in parts if not isinstance(part, str)]
        if wrong:
            raise BadRecord(f'{where}: a part of "{text_key}" has no text, found {wrong[0]!r:.40}')
        text = "".join(parts)
    if not isinstance(text, str):
        raise BadRecord(f'{where}: expected a string under "{text_key}", found {type(text).__name__}')
    role = _ROLES[role.lower()]
    return Turn(role, _unicode(text, where), learned=role != "assistant" or _learned(turn, where))


def _system(record: dict[str, Any]) -> str:
    """The system text that a record has beside its turns."""
    texts = [record[name] for name in _SYSTEM if record.get(name)]
    for text in texts:
        if not isinstance(text, str):
            raise BadRecord(f"expected a string as the record's system text, found {type(text).__name__}")
    return _unicode(texts[0], "the system text").strip() and texts[0] if texts else ""


def _learned(part: dict[str, Any], where: str) -> bool:
    """Whether a turn or a record counts in the loss; all do that do not say otherwise."""
    for name in _LOSS:
        value = part.get(name)
        if value is not None and value not in (0, 1):
            raise BadRecord(f'{where}: expected true or false, 0 or 1 under "{name}", found {value!r}')
    return all(part.get(name) is None or part[name] for name in _LOSS)


def _spelling(record: dict[str, Any]) -> Spelling | None:
    if "token_ids" not in record:
        return None
    ids, learned, tokenizer = record["token_ids"], record.get("learned"), record.get("tokenizer")
    template = record.get("template", "")
    if not isinstance(tokenizer, str) or not isinstance(template, str):
        raise BadRecord('"token_ids": expected to be told under "tokenizer" whose they are')
    ends = [end for span in learned for end in span] if _are_lists(learned) else None
    if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids) or ends is None:
        raise BadRecord('expected token ids under "token_ids" and a list of [start, end] under "learned"')
    if ends != sorted(ends) or not ends or ends[0] < 0 or ends[-1] > len(ids):
        raise BadRecord(f'"learned": expected ascending places in {len(ids)} tokens, found {learned!r}')
    return Spelling(tokenizer, template, tuple(ids), tuple(map(tuple, learned)))


def _are_lists(spans: Any) -> bool:
    return isinstance(spans, list) and all(
        isinstance(span, list) and len(span) == 2 and all(type(end) is int for end in span) for span in spans
    )


def tidy(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """The turns that there is something to learn from, in the shape that chat templates expect.

    Empty turns are left out, as are the assistant's before the first of a user (they answer nothing) and all after
    the assistant's last. Consecutive turns of one role become one, with a blank line between.

    Raises:
      BadRecord: for consecutive turns of which only some are to be learned.
    """
    kept = _joined(turns)
    while kept and kept[-1].role != "assistant":
        kept.pop()
    return tuple(kept)


def _joined(turns: Sequence[Turn]) -> list[Turn]:
    """As `tidy`, with what comes after the assistant's last turn."""
    kept: list[Turn] = []
    asked = False
    for turn in turns:
        if not turn.text.strip() or (turn.role == "assistant" and not asked):
            continue
        asked = asked or turn.role == "user"
        if kept and kept[-1].role == turn.role:
            if kept[-1].learned != turn.learned:
                raise BadRecord(f"consecutive turns of {turn.role}, of which only some are to be learned")
            kept[-1] = Turn(turn.role, f"{kept[-1].text}\n\n{turn.text}", turn.learned)
        else:
            kept.append(turn)
    return kept


def _unicode(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half an emoji, written as an escape
        raise BadRecord(f"{where} is not valid Unicode (character {error.start})") from None
    return text
