"""Turns records into token ids and says which positions count in the loss.

At each position, teacher and draft model are compared over the next token. A position counts where that next token is
the assistant's: from the last token of the turn's header to the last token of the answer. So the answer is learned, and
the token that ends the turn (`</s>`, `<|eot_id|>`), which drafts have to predict as well. In a text, every position
counts, and of a completion, those that predict it.

A record that says with which tokens of this tokenizer a target wrote it is taken at its word.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from kangaroo_jax.checkpoint.chat_template import Span
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.checkpoint.tokenizer import not_in_vocabulary, vocabulary_digest
from kangaroo_jax.data import chat
from kangaroo_jax.data.records import BadRecord, Conversation, Place, Source, Spelling, Text, Turn
from kangaroo_jax.errors import InputError

# Increase when encode.py, chat.py or records.py change how a record is tokenised: it invalidates token caches.
_VERSION = 2


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A record's token ids, and the positions that count in the loss (those whose next token is learned)."""

    ids: Int[np.ndarray, " tokens"]
    counts: Bool[np.ndarray, " tokens"]


class Encoder:
    """Tokenises records with a target's tokenizer.

    Args:
      target: gives the tokenizer and the EOS ids.
      template: name of a chat template in `chat.NAMED`; empty for the tokenizer's own.

    Raises:
      InputError: for a target without a tokenizer or without an EOS token.
    """

    def __init__(self, target: Target, template: str):
        tokenizer = target.tokenizer
        if tokenizer is None:
            raise InputError(
                f"{target.name}: has no tokenizer, which training needs; expected tokenizer.json or tokenizer.model "
                "beside its config.json"
            )
        ends = target.eos_token_ids
        if not ends:
            raise InputError(
                f"{target.name}: neither the tokenizer nor config.json names an EOS token; set eos_token_id"
            )
        self._target, self._tokenizer, self._template = target, tokenizer, template
        self._end = tokenizer.eos_token_id if tokenizer.eos_token_id in ends else ends[0]
        self._spelled_by = (vocabulary_digest(tokenizer), template)
        special = (id for id, token in tokenizer.added_tokens_decoder.items() if token.special)
        self._turn_ends = {*ends, *special}

    @property
    def fingerprint(self) -> str:
        """Hash of everything that tokens depend on besides the record: tokenizer, template and their libraries."""
        tokenizer = self._tokenizer
        vocabulary = (
            tokenizer.backend_tokenizer.to_str()
            if tokenizer.is_fast
            else json.dumps(tokenizer.get_vocab(), sort_keys=True)
        )
        parts = [
            str(_VERSION),
            importlib.metadata.version("transformers"),
            importlib.metadata.version("tokenizers"),
            type(tokenizer).__name__,
            vocabulary,
            chat.fingerprint(tokenizer, self._template),
            str(self._end),
            str(sorted(self._turn_ends)),
        ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def encode(
        self, places: Sequence[Place], contents: Sequence[Conversation | Text], sources: Sequence[Source]
    ) -> list[Tokens | BadRecord]:
        """The tokens of each record, or the reason why it cannot be used. A fast tokenizer processes them in parallel.

        Raises:
          InputError: for a conversation where there is no chat template or no fast tokenizer.
        """
        made: list[Tokens | BadRecord | None] = [None] * len(contents)
        # One call tokenises many texts, but adds special tokens to all of them or to none.
        batches: dict[bool, list[tuple[int, str]]] = {True: [], False: []}
        spans: dict[int, list[Span]] = {}
        for i, content in enumerate(contents):
            spelling = content.spelling
            if spelling is not None and (spelling.tokenizer, spelling.template) == self._spelled_by:
                made[i] = _spelled(spelling)
                continue
            if isinstance(content, Text):
                if content.prompt:
                    self._check_offsets(places[i], sources)
                batches[content.begins].append((i, content.text))
                continue
            self._check_chat(places[i], sources)
            try:
                if self._marked:
                    ids, mask = chat.tokens_and_mask(content.turns, self._tokenizer)
                    made[i] = self._chat_tokens(ids, _learned_runs(np.asarray(mask, bool), content.turns))
                else:
                    rendered = chat.render(content.turns, self._tokenizer, self._template)
                    batches[rendered.bare].append((i, rendered.text))
                    answers = [turn for turn in content.turns if turn.role == "assistant"]
                    spans[i] = [span for span, turn in zip(rendered.spans, answers, strict=True) if turn.learned]
            except BadRecord as error:
                made[i] = error
        for special, texts in batches.items():
            if not texts:
                continue
            # verbose=False: no warning for every record that is longer than the context
            out = self._tokenizer([text for _, text in texts], add_special_tokens=special, verbose=False)
            for row, (i, text) in enumerate(texts):
                ids = out["input_ids"][row]
                if i not in spans:
                    prompt = contents[i].prompt
                    learned = (
                        _covering(out.encodings[row].offsets, [(prompt, len(text))], len(text)) if prompt else None
                    )
                    made[i] = self._text_tokens(ids, contents[i].ends, learned)
                    continue
                try:
                    made[i] = self._chat_tokens(ids, _covering(out.encodings[row].offsets, spans[i], len(text)))
                except BadRecord as error:
                    made[i] = error
        return [tokens if isinstance(tokens, BadRecord) else self._within_vocabulary(tokens) for tokens in made]

    def _within_vocabulary(self, tokens: Tokens) -> Tokens | BadRecord:
        """The tokens, if the target has a row for each: a tokenizer may have more, such as one for padding."""
        beyond = tokens.ids[tokens.ids >= self._target.config.vocab_size]
        if not len(beyond):
            return tokens
        return BadRecord(not_in_vocabulary(int(beyond[0]), self._tokenizer, self._target.config.vocab_size))

    def _is_space(self, token: int) -> bool:
        return token not in self._turn_ends and not self._tokenizer.decode([token]).strip()

    def _check_chat(self, place: Place, sources: Sequence[Source]) -> None:
        names = ", ".join(chat.NAMED)
        if not self._template and not self._tokenizer.chat_template:
            raise InputError(
                f"{place.describe(sources)}: a conversation, but the tokenizer of {self._target.name} has no chat "
                f"template; set data.template to the one that the target was tuned with ({names})"
            )
        self._check_offsets(place, sources)

    def _check_offsets(self, place: Place, sources: Sequence[Source]) -> None:
        if not self._tokenizer.is_fast:
            raise InputError(
                f"{place.describe(sources)}: only a part of it is to be learned, but the tokenizer of "
                f"{self._target.name} is not a fast one and cannot say which tokens that is; expected tokenizer.json "
                "beside its config.json"
            )

    @functools.cached_property
    def _marked(self) -> bool:
        return not self._template and chat.marks_generation(self._tokenizer)

    def _text_tokens(self, ids: list[int], ends: bool, learned: Bool[np.ndarray, " tokens"] | None) -> Tokens:
        """Tokens of a text, with EOS where it ends, after which nothing comes. `learned` says which are, if not all."""
        ids = np.asarray([*ids, self._end] if ends else ids, np.int32)
        if learned is None:
            learned = np.ones(len(ids) - ends, bool)
        return Tokens(ids, np.append(np.append(learned[1:], True)[: len(learned)], [False] * ends))

    def _chat_tokens(self, ids: list[int], written: Bool[np.ndarray, " tokens"]) -> Tokens:
        """Tokens of a conversation. `written` marks those that hold any of the assistant's text; raises `BadRecord` if
        it marks none."""
        written = written.copy()
        if not written.any():
            raise BadRecord("the chat template leaves out the assistant's turns")
        for end in np.flatnonzero(written[:-1] & ~written[1:]) + 1:
            stop = int(end)
            # Llama-2 puts a space before its </s>.
            while stop < len(ids) and self._is_space(ids[stop]):
                stop += 1
            if stop < len(ids) and ids[stop] in self._turn_ends:
                written[end : stop + 1] = True
        return Tokens(np.asarray(ids, np.int32), np.append(written[1:], False))


def _spelled(spelling: Spelling) -> Tokens:
    """The tokens that a record was written with."""
    learned = np.zeros(len(spelling.ids), bool)
    for start, end in spelling.learned:
        learned[start:end] = True
    return Tokens(np.asarray(spelling.ids, np.int32), np.append(learned[1:], False))


def _learned_runs(mask: Bool[np.ndarray, " tokens"], turns: Sequence[Turn]) -> Bool[np.ndarray, " tokens"]:
    """The assistant's tokens without those of turns that are not to be learned; raises `BadRecord` where the template
    does not show each answer as one run."""
    answers = [turn for turn in turns if turn.role == "assistant"]
    if all(turn.learned for turn in answers):
        return mask
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)).reshape(-1, 2)
    if len(edges) != len(answers):
        raise BadRecord("the chat template does not mark each answer, and not all are to be learned")
    mask = mask.copy()
    for (start, end), turn in zip(edges, answers, strict=True):
        mask[start:end] &= turn.learned
    return mask


def _covering(offsets: Sequence[Span], spans: Sequence[Span], length: int) -> Bool[np.ndarray, " tokens"]:
    """Marks the tokens that hold any character of `spans`. One emoji may be several tokens with the same offsets."""
    inside = np.zeros(length + 1, np.int32)
    for start, end in spans:
        inside[start + 1 : end + 1] = 1
    before = np.cumsum(inside)  # characters of the spans before each place
    starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
    return before[ends] > before[starts]
