"""The text of Gemma 3: Gemma 2's layer without soft caps of scores, with a norm on each head's query and key; layers
with a window have their own rotary positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from kangaroo_jax.checks import check_count, check_positive
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.config import AttentionKind, RopeScaling, Rotary
from kangaroo_jax.model.families import Family
from kangaroo_jax.model.families.config_json import partial_rotary_factor, rotary_keys, rotary_settings
from kangaroo_jax.model.families.gemma2 import GemmaConfig, GemmaLayer, gemma_fields, gemma_keys, gemma_windows

_WINDOWED, _FULL = "sliding_attention", "full_attention"


@dataclasses.dataclass(frozen=True)
class Gemma3Config(GemmaConfig):
    """`rope_theta` and `rope_scaling` are those of layers without a window."""

    query_key_norm: ClassVar[str] = "head"
    local_rope_theta: float = 10000.0
    local_rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("rope_local_base_freq", self.local_rope_theta)
        self.local_rotary.check()

    @property
    def context(self) -> int:
        # Scaling is counted in it; longrope is another one beyond the original context.
        ends = [
            x.original_max_position_embeddings
            for x in (self.rope_scaling, self.local_rope_scaling)
            if x is not None and x.kind == "longrope" and not x.long
        ]
        return min([self.max_position_embeddings, *ends])

    @property
    def local_rotary(self) -> Rotary:
        """Of layers with a window."""
        return Rotary(self.local_rope_theta, self.head_dim, self.local_rope_scaling)

    @property
    def attention_kinds(self) -> tuple[AttentionKind, ...]:
        local = self.local_rotary
        return tuple(
            kind if kind.window is None else AttentionKind(local, kind.window) for kind in super().attention_kinds
        )


def _read_config(contents: Mapping[str, Any]) -> Gemma3Config:
    if contents.get("attn_logit_softcapping") is not None:
        raise InputError(
            f"attn_logit_softcapping must be null for {contents['model_type']}, found "
            f"{contents['attn_logit_softcapping']!r}"
        )
    everywhere, local = _rotary_of_kinds(contents)
    fields = gemma_fields(contents, 131072, theta=1_000_000.0, rope=everywhere)
    pattern = contents.get("sliding_window_pattern", 6)
    if contents.get("layer_types") is None:
        check_count("sliding_window_pattern", pattern)
    if partial_rotary_factor(local) != 1:
        raise InputError(
            f"partial_rotary_factor must be 1 for {contents['model_type']}, found {partial_rotary_factor(local)!r} for "
            f"{_WINDOWED!r}"
        )
    theta, scaling = rotary_settings(local, 10000.0, fields["max_position_embeddings"])
    return Gemma3Config(
        **fields,
        windows=gemma_windows(contents, lambda index: (index + 1) % pattern != 0),
        logits_soft_cap=contents.get("final_logit_softcapping"),
        local_rope_theta=theta,
        local_rope_scaling=scaling,
    )


def _rotary_of_kinds(contents: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys that say how positions turn queries and keys in layers without a window, and in those with one, as a
    config.json of one rotary would have them."""
    parameters = contents.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping):
        raise InputError(f"rope_parameters must be an object, found {parameters!r}")
    unknown = sorted(set(parameters) - {_WINDOWED, _FULL})
    if unknown:
        raise InputError(f"rope_parameters must have {_FULL!r} and {_WINDOWED!r} alone, found {unknown[0]!r}")
    scaling, full = contents.get("rope_scaling"), parameters.get(_FULL)
    if scaling and isinstance(scaling, Mapping) and isinstance(full, Mapping):
        scaling = dict(full) | dict(scaling)  # as transformers does
    for settings in (scaling, full, parameters.get(_WINDOWED)):
        if isinstance(settings, Mapping) and settings.get("truncate") is False:
            raise InputError(
                "truncate false is not supported for gemma3_text, for which transformers does not read it; leave it "
                "out for its numbers"
            )
    parts = contents.get("partial_rotary_factor")
    everywhere = {
        "rope_theta": contents.get("rope_theta"),
        "rope_scaling": scaling,
        "rope_parameters": full,
        "partial_rotary_factor": parts,
    }
    local = {
        "rope_theta": contents.get("rope_local_base_freq"),
        "rope_parameters": parameters.get(_WINDOWED),
        "partial_rotary_factor": parts,
    }
    return everywhere, local


def _write_config(config: Gemma3Config) -> dict[str, Any]:
    keys = gemma_keys(config)
    del keys["rope_scaling"], keys["rope_theta"]
    settings = {
        _FULL: (config.rope_theta, config.rope_scaling),
        _WINDOWED: (config.local_rope_theta, config.local_rope_scaling),
    }
    rope = {
        kind: {"rope_theta": theta} | (rotary_keys(scaling) or {"rope_type": "default"})
        for kind, (theta, scaling) in settings.items()
    }
    return keys | {"architectures": ["Gemma3ForCausalLM"], "attn_logit_softcapping": None, "rope_parameters": rope}


FAMILY = Family("gemma3_text", _read_config, _write_config, GemmaLayer)
