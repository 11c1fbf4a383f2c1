"""Settings as frozen dataclasses, validated on construction.

`ModelConfig` describes a target and is read from a Hugging Face `config.json`; `DraftConfig` says how to draft.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from kangaroo_jax.errors import InputError

ARCHITECTURES = ("llama", "mistral", "qwen2")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context a model was trained on.

    `kind` is "linear" (all frequencies divided by `factor`) or "llama3" (low frequencies divided by `factor`, high
    ones kept, a smooth ramp between). The last three fields are for "llama3" alone.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of a target of the Llama family. Field names are Hugging Face's.

    `qkv_bias`, `o_bias` and `mlp_bias` say which projections carry a bias (Llama's `attention_bias` sets the first
    two, Qwen2 has the first only).
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a positive integer, found {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim must be even for rotary embeddings, found {self.head_dim}")

    @property
    def queries_per_kv(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
        """Reads the contents of a Hugging Face `config.json`.

        Args:
          config: the parsed file.
          source: its name, for error messages.

        Raises:
          InputError: naming `source`, the key, what was found and what is supported.
        """
        model_type = config.get("model_type")
        if model_type not in ARCHITECTURES:
            raise InputError(f"{source}: model_type {model_type!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
        if model_type == "mistral" and config.get("sliding_window") is not None:
            raise InputError(
                f"{source}: mistral with sliding_window={config['sliding_window']} is not supported; "
                "only full attention is (sliding_window: null)"
            )
        if model_type == "qwen2" and config.get("use_sliding_window"):
            raise InputError(f"{source}: qwen2 with use_sliding_window=true is not supported; only full attention is")
        if config.get("hidden_act", "silu") != "silu":
            raise InputError(f"{source}: hidden_act {config['hidden_act']!r} is not supported; supported: silu")
        if config.get("quantization_config"):
            method = config["quantization_config"].get("quant_method", "unknown")
            raise InputError(f"{source}: quantized weights ({method}) are not supported; use the unquantized checkpoint")
        required = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
        for key in required:
            if not isinstance(config.get(key), int):
                raise InputError(f"{source}: {key} must be an integer, found {config.get(key)!r}")
        heads = config["num_attention_heads"]
        eos = config.get("eos_token_id")
        attention_bias = bool(config.get("attention_bias", False)) and model_type == "llama"
        theta, scaling = _rope_from_hf(config, source)
        try:
            return cls(
                model_type=model_type,
                vocab_size=config["vocab_size"],
                hidden_size=config["hidden_size"],
                intermediate_size=config["intermediate_size"],
                num_hidden_layers=config["num_hidden_layers"],
                num_attention_heads=heads,
                num_key_value_heads=config.get("num_key_value_heads") or _DEFAULT_KV_HEADS.get(model_type, heads),
                head_dim=config.get("head_dim") or config["hidden_size"] // heads,
                max_position_embeddings=config.get("max_position_embeddings") or _DEFAULT_CONTEXT[model_type],
                rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
                rope_theta=theta,
                rope_scaling=scaling,
                tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
                qkv_bias=attention_bias or model_type == "qwen2",
                o_bias=attention_bias,
                mlp_bias=bool(config.get("mlp_bias", False)) and model_type == "llama",
                bos_token_id=config.get("bos_token_id"),
                eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,),
            )
        except InputError as error:
            raise InputError(f"{source}: {error}") from None


# What transformers assumes where a config.json leaves a key out.
_DEFAULT_CONTEXT = {"llama": 2048, "mistral": 4096 * 32, "qwen2": 32768}
_DEFAULT_KV_HEADS = {"mistral": 8, "qwen2": 32}


def _rope_from_hf(config: Mapping[str, Any], source: str) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling, in the old spelling (`rope_theta`, `rope_scaling.type`) or the new
    (`rope_parameters.rope_theta`, `.rope_type`)."""
    parameters = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise InputError(f"{source}: rope type {kind!r} is not supported; supported: default, linear, llama3")
    keys = ["factor"]
    if kind == "llama3":
        keys += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    for key in keys:
        if not isinstance(parameters.get(key), int | float):
            raise InputError(f"{source}: rope type {kind!r} needs a number for {key!r}, found {parameters.get(key)!r}")
    return theta, RopeScaling(kind, **{key: parameters[key] for key in keys})


@dataclasses.dataclass(frozen=True)
class DraftConfig:
    """How a round drafts (paper, section 3.2).

    Attributes:
      exit_layer: number of shallow layers l; None means the one the adapter was trained for.
      max_draft_len: gamma, the most tokens drafted in a round.
      threshold: eta; drafting stops after a token whose top-1 draft probability was below it. 0 never stops early.
    """

    exit_layer: int | None = None
    max_draft_len: int = 6
    threshold: float = 0.6

    def __post_init__(self) -> None:
        if self.exit_layer is not None and self.exit_layer < 1:
            raise InputError(f"exit_layer must be at least 1, found {self.exit_layer}")
        if self.max_draft_len < 1:
            raise InputError(f"max_draft_len must be at least 1, found {self.max_draft_len}")
        if not 0.0 <= self.threshold <= 1.0:
            raise InputError(f"threshold must be between 0 and 1, found {self.threshold}")
