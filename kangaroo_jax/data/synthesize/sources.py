"""What records are made of: questions that the target asks itself, prompts of a file, or texts to continue."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from kangaroo_jax import paths
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.checkpoint.tokenizer import vocabulary_digest
from kangaroo_jax.config import SynthesisConfig
from kangaroo_jax.data.records import BadRecord, Conversation, Text, Turn, asked, find_sources, read_records
from kangaroo_jax.data.synthesize.continuation import Continuation
from kangaroo_jax.data.synthesize.conversation import Conversation as Writing
from kangaroo_jax.data.synthesize.conversation import normalised
from kangaroo_jax.data.synthesize.frame import Template, encode
from kangaroo_jax.data.synthesize.record_file import Record
from kangaroo_jax.errors import InputError

_SHORTEST = 16  # tokens of a beginning
_CHARACTERS_PER_TOKEN = 16  # at most, nearly always
_TRIES = 100


class _Source:
    """What all sources have in common; `run.Source` describes it."""

    count: int | None = None
    advice = ""

    def __init__(self, kind: str, target: Target, settings: SynthesisConfig, template: str, data: str = ""):
        self._target, self._settings = target, settings
        if target.tokenizer is None:
            raise InputError(f"{target.name}: has no tokenizer; put its tokenizer files beside it")
        fields = dataclasses.asdict(settings)
        # Records do not depend on these, or on what is in them (`data`).
        for name in ("conversations", "batch_size", "openings", "texts"):
            del fields[name]
        self.settings: dict[str, Any] = {"kind": kind, "template": template, "data": data, **fields}
        self.every = {"tokenizer": vocabulary_digest(target.tokenizer)} | ({"template": template} if template else {})

    def key(self, record: Record) -> Hashable:
        return record["index"]


class SelfAsked(_Source):
    """Conversations of which the target writes both sides.

    Args:
      target: with a tokenizer.
      settings: limits, mix, seed.
      template: one of `data.chat.NAMED`, or empty for the tokenizer's own.

    Raises:
      InputError: as `Template` and `Template.frame`; for openings that cannot be read, or with special tokens.
    """

    advice = "ask for fewer, or raise the temperature of the questions or their limit"

    def __init__(self, target: Target, settings: SynthesisConfig, template: str = ""):
        self._openings = _read_openings(settings.openings) if settings.openings else [""]
        data = _digest(self._openings) if settings.openings else ""
        super().__init__("conversations", target, settings, template, data)
        self._template = Template(target, template)
        self._frame = self._template.frame()
        for number, opening in enumerate(self._openings, 1):
            if not self._frame.is_text(opening):
                raise InputError(f"{settings.openings}: line {number} has a special token of {target.name}; remove it")

    def job(self, index: int) -> Writing:
        drawn = np.random.default_rng((self._settings.seed, index)).integers(len(self._openings))
        return Writing(index, self._template, self._frame, self._settings, opening=self._openings[drawn])

    def key(self, record: Record) -> Hashable:
        return normalised(record["messages"][0]["content"])


class Regenerated(_Source):
    """Answers to the questions of files, in place of those that are there: `prompt`, or the turns of a conversation.

    Args:
      target: with a tokenizer. One without a template continues prompts as they are.
      settings: limits, mix, seed.
      files: paths and globs.
      template: as for `SelfAsked`.

    Raises:
      InputError: for files that cannot be read, or a record without a question.
    """

    advice = "give other prompts, or raise the limit of answers"

    def __init__(self, target: Target, settings: SynthesisConfig, files: str, template: str = ""):
        sources = find_sources(files)
        self._questions: list[tuple[Turn, ...]] = []
        for source in sources:
            if not source.holds_records:
                raise InputError(f"{source.name}: expected a file of records, ending in .jsonl or .json")
        for entry in read_records(sources, asked):
            if isinstance(entry.content, BadRecord):
                raise InputError(f"{entry.place.describe(sources)}: {entry.content}; fix or remove it")
            if isinstance(entry.content, Conversation):
                self._questions.append(entry.content.turns)
        if not self._questions:
            raise InputError(f'{files}: no prompts; expected lines of "prompt" or "messages"')
        self.count = len(self._questions)
        super().__init__("answers", target, settings, template, _digest(self._questions))
        self._chat = bool(template or target.tokenizer.chat_template)
        if self._chat:
            self._template = Template(target, template)
            self._frame = self._template.frame()
        elif any(len(turns) > 1 for turns in self._questions):
            Template(target, template)  # says that there is none

    def job(self, index: int) -> Writing | Continuation:
        questions = self._questions[index]
        if self._chat:
            return Writing(index, self._template, self._frame, self._settings, questions)
        ids = encode(self._target.tokenizer, questions[0].text, special=True)
        return Continuation(index, self._target, self._settings, ids)


class Continued(_Source):
    """Continuations of texts: each begins at a random place, with 16 to `question_tokens` tokens.

    Args:
      target: with a tokenizer; it needs no chat template.
      settings: limits, mix, seed.
      files: as `data.files`, but of texts.

    Raises:
      InputError: for files that cannot be read, or without a text that is long enough.
    """

    advice = "ask for fewer, or give other texts"

    def __init__(self, target: Target, settings: SynthesisConfig, files: str):
        sources = find_sources(files)
        entries = read_records(sources)
        self._texts = [entry.content.text for entry in entries if isinstance(entry.content, Text)]
        super().__init__("continuations", target, settings, "", _digest(self._texts))
        lengths = [max(0, len(text) - _SHORTEST) for text in self._texts]
        if not sum(lengths):
            raise InputError(f"{files}: no texts of more than {_SHORTEST} characters to continue")
        self._ends = np.cumsum(lengths)

    def job(self, index: int) -> Continuation:
        return Continuation(index, self._target, self._settings, self._beginning(index))

    def _beginning(self, index: int) -> list[int]:
        """Tokens from a random place of the texts. Not the first, which may be half a word; after BOS, if the tokenizer
        puts one before a text."""
        rng = np.random.default_rng((self._settings.seed, index))
        tokenizer = self._target.tokenizer
        for _ in range(_TRIES):
            wanted = int(rng.integers(_SHORTEST, max(_SHORTEST, self._settings.question_tokens) + 1))
            place = int(rng.integers(self._ends[-1]))
            number = int(np.searchsorted(self._ends, place, side="right"))
            start = place - (int(self._ends[number - 1]) if number else 0)
            text = self._texts[number][start : start + _CHARACTERS_PER_TOKEN * (wanted + 1)]
            ids = encode(tokenizer, text)[1 : wanted + 1]
            if len(ids) >= _SHORTEST:
                bos = encode(tokenizer, "a", special=True)[:1] == [tokenizer.bos_token_id]
                return [tokenizer.bos_token_id] * bos + ids
        raise InputError(f"the texts to continue are too short: none of {_SHORTEST} tokens in {_TRIES} places")


def _read_openings(file: str) -> list[str]:
    path = paths.expanded(file)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error}); give a text file of openings, one on a line") from None
    if not lines:
        raise InputError(f"{file}: is empty; give openings, one on a line")
    return [line.strip() for line in lines]


def choose_source(target: Target, settings: SynthesisConfig, template: str = "") -> SelfAsked | Continued:
    """Texts to continue where settings name some, else conversations."""
    if settings.texts:
        return Continued(target, settings, settings.texts)
    return SelfAsked(target, settings, template)


def _digest(data: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]
