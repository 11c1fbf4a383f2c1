"""What identifies a target: a digest of the constants and weights that its logits follow from.

Adapters and caches record it, and are refused by a target with another. So what is hashed must never change within a
version: a version lists its fields by name. A field that is added to `ModelConfig` later counts only where its value is
not its default, so that the targets that existed before keep their fingerprint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.families import model_types_alike

# Of each tensor: enough to tell fine-tuned weights apart, and read in no time.
_VALUES = 64
_INT8 = ":int8"

_VERSION_2 = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "tie_word_embeddings",
    "qkv_bias",
    "o_bias",
    "mlp_bias",
)
# No logit depends on these.
_WITHOUT_EFFECT = ("max_position_embeddings", "bos_token_id", "eos_token_ids")
_ROPE_OF_TEXTS = ("long",)  # the same target, loaded for longer texts
_ROPE_SCALING = ("kind", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def sample_index(shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The rows of a tensor that hold its first values, for `sample`."""
    rows = -(-_VALUES // math.prod(shape[1:]))
    return tuple(slice(0, min(rows if i == 0 else size, size)) for i, size in enumerate(shape))


def sample(rows: np.ndarray) -> np.ndarray:
    """What is hashed of the rows of a tensor that `sample_index` names. In float32, which is the same whatever file
    format and wider dtype a checkpoint is converted to."""
    return rows.reshape(-1)[:_VALUES].astype(np.float32)


def fingerprints(config: ModelConfig, samples: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """A target's fingerprint, followed by others that it is known by: that which an earlier version of this package
    gave it, and those that it has under other model_types that mean the same model (a Mistral without windows is a
    Llama).

    Args:
      config: of the target.
      samples: tensor name -> `sample` of it, in the order of the model's parameters.
    """
    found = list(_fingerprints(config, samples))
    for model_type in model_types_alike(config):
        if model_type != config.model_type:
            found.append(_fingerprints(dataclasses.replace(config, model_type=model_type), samples)[0])
    return tuple(found)


def _fingerprints(config: ModelConfig, samples: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """Under its own model_type alone."""
    later = _later(config, _VERSION_2 + _WITHOUT_EFFECT)
    parts = [_json(constants(config))]
    for name in sorted(samples):
        parts += [name.encode(), samples[name].tobytes()]
    current = f"v2:{_digest(parts)}"
    if later:  # version 1 did not know these, so no adapter of its time is for this target
        return (current,)
    # Version 1 had no prefix, and counted max_position_embeddings.
    version_1 = _constants(config, _VERSION_2) | {
        "max_position_embeddings": config.max_position_embeddings,
        "bos_token_id": None,
        "eos_token_ids": None,
    }
    return current, _digest([_json(version_1), *(x.tobytes() for x in samples.values())])


def of_int8(fingerprint: str) -> str:
    """The fingerprint of a target whose weights were rounded to int8, from its checkpoint's."""
    return fingerprint + _INT8


def is_int8(fingerprint: str) -> bool:
    """Whether it is of a target whose weights were rounded to int8."""
    return fingerprint.endswith(_INT8)


def of_checkpoint(fingerprint: str) -> str:
    """The inverse of `of_int8`; a fingerprint of float weights is its checkpoint's own."""
    return fingerprint.removesuffix(_INT8)


def constants(config: ModelConfig) -> dict[str, Any]:
    """The constants of a target that its logits follow from, as JSON values: its shapes, and what its layers compute
    with."""
    found = _constants(config, _VERSION_2) | _later(config, _VERSION_2 + _WITHOUT_EFFECT)
    return json.loads(_json(found))


def same_constants(recorded: Mapping[str, Any], config: ModelConfig) -> bool:
    """Whether a target with the `constants` that were recorded differs from one with `config` in weights alone. Numbers
    may differ as much as float32 rounds, in which some file formats store them; and model_types, where they mean the
    same model."""
    recorded = dict(recorded)
    if recorded.get("model_type") in model_types_alike(config):
        recorded["model_type"] = config.model_type
    return _alike(recorded, constants(config))


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(a[name], b[name]) for name in a)
    if isinstance(a, numbers.Real) and isinstance(b, numbers.Real):
        return math.isclose(a, b, rel_tol=1e-6)
    return a == b


def _digest(parts: Sequence[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _json(constants: dict[str, Any]) -> bytes:
    return json.dumps(constants, sort_keys=True).encode()


def _constants(config: ModelConfig, names: Sequence[str]) -> dict[str, Any]:
    constants = {name: getattr(config, name) for name in names}
    scaling = config.rope_scaling
    if scaling is not None:
        rope = {name: getattr(scaling, name) for name in _ROPE_SCALING}
        constants["rope_scaling"] = rope | _later(scaling, _ROPE_SCALING + _ROPE_OF_TEXTS)
    return constants


def _later(settings: Any, known: Sequence[str]) -> dict[str, Any]:
    """The fields of a dataclass that are not among `known` and whose values are not their defaults."""
    values = dataclasses.asdict(settings)
    later = [field for field in dataclasses.fields(settings) if field.name not in known]
    return {field.name: values[field.name] for field in later if getattr(settings, field.name) != field.default}
