"""Families of targets, one file each: the only place that names a family.

A module of this package that defines `FAMILY` is a family; there is no list to add it to. What families share in
reading a config.json is in config_json.py.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from kangaroo_jax.errors import InputError
from kangaroo_jax.model.config import ModelConfig

_EXPERTS = "it would need a mixture of experts"

# What models that are close to a family have besides, for the message that refuses them.
_NEEDS = {
    "deepseek_v3": f"{_EXPERTS}, and attention to compressed keys and values",
    "gemma": "Gemma 2 and later are",
    "gemma3": "it has a vision tower; its text alone, saved as Gemma3ForCausalLM, is gemma3_text",
    "gpt_oss": f"{_EXPERTS}, and attention sinks",
    "granitemoe": _EXPERTS,
    "ministral3": "it would need queries scaled by their position",
    "mistral3": "it has a vision tower",
    "mixtral": _EXPERTS,
    "olmo3": "it would need OLMo 2's layer with windows",
    "qwen2_5_vl": "it has a vision tower",
    "qwen2_moe": _EXPERTS,
    "qwen2_vl": "it has a vision tower",
    "qwen3_moe": _EXPERTS,
    "qwen3_vl": "it has a vision tower",
}


def standard_tensor_name(name: str) -> str:
    """The name in a checkpoint's files of the tensor `name`, which has Hugging Face's name without a prefix
    ("layers.0.mlp.up_proj.weight")."""
    return name if name.startswith("lm_head") else f"model.{name}"


@dataclasses.dataclass(frozen=True)
class Family:
    """How the targets of one family are read, written and computed.

    Attributes:
      model_type: as config.json spells it.
      read_config: the contents of a config.json -> its `ModelConfig`, or a subclass with the family's own fields.
        Raises `InputError` for what the family's layer does not compute.
      write_config: the inverse, without the dtype of the weights.
      decoder_layer: the class of a layer: constructed and called as `layers.DecoderLayer`. It has its attention as
        `self_attn`, and the norm before that, if there is one, as `input_layernorm`: an adapter starts from them.
      tensor_name: as `standard_tensor_name`, for a family whose files name tensors otherwise.
      partitions: of parameters that no other family has, as rows of the table in sharding.py: the end of a path (a
        regular expression), and the mesh axes of each dimension.
      fused: tensors in its files that are several joined along their first axis: the end of the name, without
        ".weight", and those of the single ones, in order.
      same_as: the family whose targets compute the same from the same `ModelConfig`, where there is one; of several,
        all name one.
    """

    model_type: str
    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    write_config: Callable[[Any], dict[str, Any]]
    decoder_layer: Callable[..., Any]
    tensor_name: Callable[[str], str] = standard_tensor_name
    partitions: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    same_as: str | None = None


def all_families() -> tuple[Family, ...]:
    """All families, by model_type."""
    return _found(tuple(__path__))


@functools.cache
def _found(path: tuple[str, ...]) -> tuple[Family, ...]:
    # Imported when first asked for, not with this package: a family's module imports layers, which may import this.
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(path)]
    found = sorted((module.FAMILY for module in modules if hasattr(module, "FAMILY")), key=lambda x: x.model_type)
    types = [family.model_type for family in found]
    if len(set(types)) < len(types):
        raise ValueError(f"a model_type has two families: {types}")
    return tuple(found)


def family_of(config: ModelConfig) -> Family:
    """The family of a target.

    Raises:
      InputError: for a model_type of no family.
    """
    return _family(config.model_type)


def _family(model_type: Any) -> Family:
    for family in all_families():
        if family.model_type == model_type:
            return family
    supported = ", ".join(family.model_type for family in all_families())
    needs = _NEEDS.get(model_type) if isinstance(model_type, str) else None
    needs = f" ({needs})" if needs else ""
    raise InputError(f"model_type {model_type!r} is not supported{needs}; supported: {supported}")


def read_config(contents: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """Reads the contents of a Hugging Face `config.json`.

    A key that is left out means what transformers takes it to mean (its models/*/configuration_*.py).

    Args:
      contents: of the file, parsed.
      source: its name, for error messages.

    Raises:
      InputError: naming `source`, the key, what was found and what is supported.
    """
    try:
        return _without_idle_windows(_family(contents.get("model_type")).read_config(contents))
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def _without_idle_windows(config: ModelConfig) -> ModelConfig:
    """Without windows that no text is longer than: a target with them is the same as one without, and has its
    fingerprint. They stay where they also say how positions turn queries and keys, as in Gemma 3."""
    longest = max(config.context, config.max_position_embeddings)  # also once it is loaded for long texts
    if any(window is not None and window < longest for window in config.windows):
        return config
    without = dataclasses.replace(config, windows=())
    kinds = zip(config.attention_kinds, without.attention_kinds, strict=True)
    return without if all(old.rotary == new.rotary for old, new in kinds) else config


def model_types_alike(config: ModelConfig) -> tuple[str, ...]:
    """The model_types with which `config` means the same model, its own among them."""
    family = family_of(config)
    kind = family.same_as or family.model_type
    return tuple(other.model_type for other in all_families() if kind in (other.same_as, other.model_type))
