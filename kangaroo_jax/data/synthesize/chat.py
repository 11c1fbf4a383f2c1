"""Conversations of which the target writes both sides, as a source of records."""

from __future__ import annotations

import dataclasses
from typing import Any

from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.config import SynthesisConfig
from kangaroo_jax.data.synthesize.conversation import Conversation, normalised
from kangaroo_jax.data.synthesize.frame import find_frame
from kangaroo_jax.data.synthesize.record_file import Record


class SelfAsked:
    """A `run.Source` of conversations.

    Args:
      target: with a tokenizer.
      settings: how many there are to be plays no part.
      template: one of `data.chat.NAMED`, or empty for the tokenizer's own.

    Raises:
      InputError: as `find_frame`.
    """

    count = None
    advice = "ask for fewer conversations, or raise the temperature of the questions or their limit"

    def __init__(self, target: Target, settings: SynthesisConfig, template: str = ""):
        self._target, self._settings, self._frame = target, settings, find_frame(target, template)
        fields = dataclasses.asdict(settings)
        del fields["conversations"], fields["batch_size"]
        self.settings: dict[str, Any] = {"kind": "conversations", "template": template, **fields}

    def job(self, index: int) -> Conversation:
        return Conversation(index, self._target, self._frame, self._settings)

    def key(self, record: Record) -> str:
        return normalised(record["messages"][0]["content"])
