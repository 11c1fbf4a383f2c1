"""What `load_target` needs of a checkpoint, whatever format it has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from kangaroo_jax.checkpoint.weights import Weights
from kangaroo_jax.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint, opened; its weights' values are not read yet.

    Attributes:
      config: shape and constants.
      eos_token_ids: what ends a text, as the configuration says.
      weights: the tensors, by Hugging Face's names.
      read_tokenizer: reads the tokenizer, of transformers; None where the checkpoint has none.
    """

    config: ModelConfig
    eos_token_ids: tuple[int, ...]
    weights: Weights
    read_tokenizer: Callable[[], Any]
