"""A file of prompts: `{"id": ..., "prompt": "..."}` or `{"id": ..., "messages": [...]}` per line, with
"max_new_tokens" and "seed" where wanted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from kangaroo_jax import buckets, json_text, paths
from kangaroo_jax.checkpoint.chat_template import Message, check_messages
from kangaroo_jax.errors import InputError

Id = int | str


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One line of the file. What it leaves out is None.

    Attributes:
      id: different for each line.
      content: text, or messages.
      max_new_tokens: of its answer.
      seed: of sampling.
    """

    id: Id
    content: str | list[Message]
    max_new_tokens: int | None
    seed: int | None

    @property
    def digest(self) -> str:
        """Of all but the id: which prompt an answer is to."""
        content = json.dumps([self.content, self.max_new_tokens, self.seed])
        return hashlib.sha256(content.encode()).hexdigest()[:12]


def read_prompts(path: str) -> tuple[list[Prompt], list[str]]:
    """The prompts of a file in its order, and a message for each line that is none.

    Fields of other names are left alone; empty lines are passed over.

    Raises:
      InputError: for a file that cannot be read, or that has no line with anything on it.
    """
    paths.check_not_named_pipe(path, f"--input={path}")
    try:
        content = buckets.read_bytes(path)
    except OSError as error:
        raise InputError(f"--input={path}: {error.strerror}") from None
    prompts: list[Prompt] = []
    bad: list[str] = []
    places: dict[Id, int] = {}
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            prompt = _prompt(line)
            if prompt.id in places:
                raise InputError(f"the id {prompt.id!r} is line {places[prompt.id]}'s; give each line its own")
        except InputError as error:
            bad.append(f"{path} line {number}: {error}")
        else:
            places[prompt.id] = number
            prompts.append(prompt)
    if not prompts and not bad:
        raise InputError(f'--input={path}: no prompts; expected lines like {{"id": "a", "prompt": "..."}}')
    return prompts, bad


def _prompt(line: bytes) -> Prompt:
    try:
        raw = json_text.parse(line.decode())
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 (byte {error.start})") from None
    except ValueError as error:
        raise InputError(f"not JSON ({error})") from None
    if not isinstance(raw, dict):
        raise InputError('expected an object with "id" and "prompt"')
    if "id" not in raw:
        raise InputError('"id" is missing')
    if ("prompt" in raw) == ("messages" in raw):
        raise InputError(
            '"prompt" and "messages" are both there; give one' if "prompt" in raw else '"prompt" is missing'
        )
    if not (_is_integer(raw["id"]) or (isinstance(raw["id"], str) and raw["id"])):
        raise InputError(f'"id" must be a text or an integer, found {_shown(raw["id"])}')
    if "messages" in raw:
        check_messages(raw["messages"])
    elif not isinstance(raw["prompt"], str):
        raise InputError(f'"prompt" must be a text, found {_shown(raw["prompt"])}')
    most, seed = raw.get("max_new_tokens"), raw.get("seed")
    if most is not None and not (_is_integer(most) and most >= 1):
        raise InputError(f'"max_new_tokens" must be a positive integer, found {_shown(most)}')
    if seed is not None and not (_is_integer(seed) and 0 <= seed < 2**32):
        raise InputError(f'"seed" must be an integer from 0 to 2**32 - 1, found {_shown(seed)}')
    return Prompt(raw["id"], raw["messages"] if "messages" in raw else raw["prompt"], most, seed)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
