"""Texts that a target continues."""

from __future__ import annotations

from collections.abc import Sequence

from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.config import SamplingConfig, SynthesisConfig
from kangaroo_jax.data.synthesize.mix import Kind, seed_of
from kangaroo_jax.data.synthesize.record_file import Record
from kangaroo_jax.engine.requests import Answer, Request


class Continuation:
    """One text on its way: a `run.Job`.

    Args:
      index: decides the kind, and the seed of sampling.
      target: with a tokenizer.
      settings: limits, mix, seed.
      prompt: token ids of the text's beginning.
    """

    key = None

    def __init__(self, index: int, target: Target, settings: SynthesisConfig, prompt: Sequence[int]):
        self._index, self._greedy = index, Kind.of(index, settings).greedy
        self._target, self._settings, self._prompt = target, settings, list(prompt)

    def start(self) -> Record | str | None:
        """To be called first; returns what `take` does."""
        return None if self._room() > 0 else "no room"

    def request(self) -> Request:
        """What is to be decoded."""
        settings = self._settings
        return Request(
            self._prompt,
            min(settings.answer_tokens, self._room()),
            SamplingConfig() if self._greedy else SamplingConfig(settings.answer_temperature),
            seed=seed_of(settings.seed, self._index),
            stream=False,
        )

    def take(self, answer: Answer) -> Record | str | None:
        """Takes what was decoded: the record, or why there is none."""
        if not answer.text:
            return "continuation empty"
        ids = self._prompt + answer.tokens
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return {
            "prompt": self._target.tokenizer.decode(self._prompt, **options),
            "completion": answer.text,
            "answers": "greedy" if self._greedy else "sampled",
            "end": answer.finish_reason,
            "token_ids": ids,
            "learned": [[len(self._prompt), len(ids)]],
        }

    def _room(self) -> int:
        return self._target.config.context - len(self._prompt)
