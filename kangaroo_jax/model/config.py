"""Shape and constants of a target. families/ reads them from a Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses

from kangaroo_jax.checks import check_count, check_flag, check_positive
from kangaroo_jax.errors import InputError


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

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise InputError(f"rope type {self.kind!r} is not supported; supported: default, linear, llama3")
        check_positive("rope factor", self.factor)
        check_positive("rope low_freq_factor", self.low_freq_factor)
        check_positive("rope high_freq_factor", self.high_freq_factor)
        check_count("rope original_max_position_embeddings", self.original_max_position_embeddings)
        if self.high_freq_factor <= self.low_freq_factor:
            raise InputError(
                f"rope high_freq_factor must be above low_freq_factor ({self.low_freq_factor}), "
                f"found {self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of a target: what every family has. Field names are Hugging Face's; `qkv_bias`, `o_bias` and
    `mlp_bias` say which projections carry a bias. A family with more has a subclass of its own.

    Raises:
      InputError: for a value that no model can have.
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
            check_count(name, getattr(self, name))
        for name in ("rms_norm_eps", "rope_theta"):
            check_positive(name, getattr(self, name))
        for name in ("tie_word_embeddings", "qkv_bias", "o_bias", "mlp_bias"):
            check_flag(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads must be a multiple of num_key_value_heads ({self.num_key_value_heads}), "
                f"found {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim must be even for rotary embeddings, found {self.head_dim}")

    @property
    def context(self) -> int:
        """Positions that the model was made for. Linear scaling multiplies them (Vicuna-16k: 4096 by 4), llama3's are
        counted in max_position_embeddings already."""
        scaling = self.rope_scaling
        stretched = scaling is not None and scaling.kind == "linear"
        return int(self.max_position_embeddings * scaling.factor) if stretched else self.max_position_embeddings

    @property
    def queries_per_kv(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads
