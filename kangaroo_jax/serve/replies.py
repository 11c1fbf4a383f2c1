"""Responses in the shapes of OpenAI's API."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from kangaroo_jax.engine.draft_spans import Span
from kangaroo_jax.engine.requests import Answer

_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


class CompletionReply:
    """What /v1/completions answers, as a complete response or in chunks.

    Args:
      model: its name.
    """

    _OBJECT = _CHUNK = "text_completion"
    _PREFIX = "cmpl"

    def __init__(self, model: str):
        self._head = {"id": f"{self._PREFIX}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def complete(self, answers: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        """The response to a request that does not stream."""
        choices = [self._choice(i, answer.text) | _ended(answer) for i, answer in enumerate(answers)]
        return {**self._head, "object": self._OBJECT, "choices": choices, "usage": usage}

    def begin(self, index: int) -> dict[str, Any] | None:
        """The first chunk of an answer, if it has one before its text."""

    def delta(self, index: int, text: str, spans: Sequence[Span] | None) -> dict[str, Any]:
        """A chunk: the new text, and who drafted what of it where that is wanted."""
        return self._chunk([self._part(index, text) | {"finish_reason": None}], spans)

    def end(self, index: int, answer: Answer, spans: Sequence[Span] | None) -> dict[str, Any]:
        """The last chunk of an answer."""
        return self._chunk([self._part(index, "") | _ended(answer)], spans)

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last chunk, where the counts of tokens are wanted."""
        return self._chunk([], None) | {"usage": usage}

    def _chunk(self, choices: list[dict[str, Any]], spans: Sequence[Span] | None) -> dict[str, Any]:
        chunk = {**self._head, "object": self._CHUNK, "choices": choices}
        if spans is not None:
            chunk["kangaroo"] = {"spans": [[span.kind, span.text, span.round] for span in spans]}
        return chunk

    def _choice(self, index: int, text: str) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None}

    def _part(self, index: int, text: str) -> dict[str, Any]:
        return self._choice(index, text)


class ChatReply(CompletionReply):
    """What /v1/chat/completions answers."""

    _OBJECT, _CHUNK = "chat.completion", "chat.completion.chunk"
    _PREFIX = "chatcmpl"

    def begin(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}], None)

    def _choice(self, index: int, text: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None}

    def _part(self, index: int, text: str) -> dict[str, Any]:
        return {"index": index, "delta": {"content": text} if text else {}, "logprobs": None}


def usage_of(prompts: Sequence[Sequence[int]], answers: Sequence[Answer]) -> dict[str, Any]:
    """Counts of tokens.

    Args:
      prompts: token ids of each prompt; one of several answers counts once.
      answers: to the first prompt, then to the second, ...; as many to each.

    Returns:
      OpenAI's `usage`, with a field of its own: the mean accept length (tokens per round; 1 without any round), the
      rounds, and the seconds of the answer that took longest, from the start of its prefill, compilation not counted.
    """
    prompt = sum(map(len, prompts))
    completion = sum(len(answer.tokens) for answer in answers)
    rounds = sum(len(answer.accept_lengths) for answer in answers)
    committed = sum(sum(answer.accept_lengths) for answer in answers)
    cached = sum(answer.reused_tokens for answer in answers[:: len(answers) // len(prompts)])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "kangaroo": {
            "accept_length": round(committed / rounds, 4) if rounds else 1.0,
            "rounds": rounds,
            "seconds": round(max(answer.seconds for answer in answers), 6),
        },
    }


def _ended(answer: Answer) -> dict[str, str]:
    return {"finish_reason": _REASONS[answer.finish_reason]}
