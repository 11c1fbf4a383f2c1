"""Shape and constants of a target. families/ reads them from a Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from kangaroo_jax.checks import check_count, check_flag, check_positive, check_size
from kangaroo_jax.errors import InputError

_MOST = 1_000_000  # times that a context is stretched: beyond it a file is damaged
ROPE_KINDS = ("linear", "dynamic", "llama3", "yarn", "longrope")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context a model was trained on.

    `kind` is "linear" (all frequencies divided by `factor`), "llama3" (low frequencies divided by `factor`, high ones
    kept, a smooth ramp between), "yarn" (the same, with a ramp over dimensions), "dynamic" or "longrope". The last two
    have other frequencies for texts that are longer than a limit, in all of their positions. Such a text's first
    tokens would have to be computed again, so the limit is the model's context here (`ModelConfig.context`), unless
    all texts are turned as longer ones are.

    Attributes:
      kind: of the scaling.
      factor: of the context. For "dynamic" and "longrope", that of longer texts.
      low_freq_factor: of "llama3": fewer turns than this in the original context are a low frequency.
      high_freq_factor: of "llama3": more turns than this are a high frequency.
      original_max_position_embeddings: the context it was trained on; not of "linear" and "dynamic".
      beta_fast: of "yarn": turns in the original context from which a frequency is kept.
      beta_slow: of "yarn": turns below which it is divided.
      truncate: of "yarn": whether the ramp begins and ends at complete dimensions.
      attention_factor: of "yarn" and "longrope": cosines and sines are multiplied by it.
      short_factor: of "longrope": what each frequency is divided by.
      long_factor: of "longrope": the same for longer texts.
      long: of "longrope": whether all texts are turned as longer ones are.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    long: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise InputError(f"rope type {self.kind!r} is not supported; supported: default, {', '.join(ROPE_KINDS)}")
        for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"):
            check_positive(f"rope {name}", getattr(self, name))
        if self.factor > _MOST:
            raise InputError(f"rope factor must be at most {_MOST}, found {self.factor!r}")
        check_size("rope original_max_position_embeddings", self.original_max_position_embeddings)
        check_flag("rope truncate", self.truncate)
        for name in ("short_factor", "long_factor"):
            for value in getattr(self, name):
                check_positive(f"rope {name}", value)
        if self.high_freq_factor <= self.low_freq_factor:
            raise InputError(
                f"rope high_freq_factor must be above low_freq_factor ({self.low_freq_factor}), "
                f"found {self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class Rotary:
    """How positions turn queries and keys.

    Attributes:
      theta: base of the frequencies.
      dim: of a head's dimensions, how many are turned, from the first; even.
      scaling: of the frequencies.
    """

    theta: float
    dim: int
    scaling: RopeScaling | None = None

    def check(self) -> None:
        """Raises `InputError` for what has no angles."""
        scaling = self.scaling
        if scaling is None:
            return
        if scaling.kind == "yarn" and self.theta <= 1:
            raise InputError(f"rope_theta must be above 1 for rope type 'yarn', found {self.theta!r}")
        for name in ("short_factor", "long_factor") if scaling.kind == "longrope" else ():
            if len(getattr(scaling, name)) != self.dim // 2:
                raise InputError(f"rope {name} must have {self.dim // 2} values, found {len(getattr(scaling, name))}")


@dataclasses.dataclass(frozen=True)
class AttentionKind:
    """What attention of one layer may differ in from that of another of the same model.

    Attributes:
      rotary: None leaves queries and keys as they are.
      window: how many positions a token sees, itself the last of them; None is all.
    """

    rotary: Rotary | None
    window: int | None = None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of a target: what every family has. Field names are Hugging Face's; `qkv_bias`, `o_bias` and
    `mlp_bias` say which projections carry a bias, `windows` how many positions each layer's tokens see (None: all;
    empty: all in every layer).

    A family with more has a subclass of its own. What follows the fields is what the shared parts (layers.py,
    target.py) ask for besides them; a subclass overrides it, by fields of its own or by constants.

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
    windows: tuple[int | None, ...] = ()

    norm_offset: ClassVar[float] = 0.0  # added to the weights of norms
    norm_in_float32: ClassVar[bool] = False  # whether norms multiply by their weights before they round
    query_key_norm: ClassVar[str | None] = None  # of queries and of keys: "head", of each; "all", of all heads as one
    activation: ClassVar[str] = "silu"  # of the MLP's gate; or "gelu_tanh"
    embedding_multiplier: ClassVar[float] = 1.0  # of embeddings
    residual_multiplier: ClassVar[float] = 1.0  # of what attention and MLP add
    logits_divisor: ClassVar[float] = 1.0
    attention_soft_cap: ClassVar[float | None] = None  # c: scores become c tanh(score / c)
    logits_soft_cap: ClassVar[float | None] = None

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
            check_size(name, getattr(self, name))
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
        self.rotary.check()
        if self.windows and len(self.windows) != self.num_hidden_layers:
            raise InputError(
                f"attention must be named for each of {self.num_hidden_layers} layers, found {len(self.windows)}"
            )
        for window in self.windows:
            if window is not None:
                check_count("sliding_window", window)

    @property
    def context(self) -> int:
        """Positions that the model was made for, and of which `Rotary` gives the numbers. Linear scaling multiplies
        them (Vicuna-16k: 4096 by 4); llama3's are counted in max_position_embeddings already; yarn's may be."""
        scaling, positions = self.rope_scaling, self.max_position_embeddings
        if scaling is None:
            return positions
        if scaling.kind == "linear":
            return int(positions * scaling.factor)
        if scaling.kind == "yarn":
            return max(positions, int(scaling.original_max_position_embeddings * scaling.factor))
        if scaling.kind == "longrope" and not scaling.long:
            return min(positions, scaling.original_max_position_embeddings)
        return positions

    def for_long_texts(self) -> ModelConfig:
        """The same with longrope's long factors for all texts, and so the context that the model was made for. Texts
        within the original context are then turned otherwise than the model's makers turn them.

        Raises:
          InputError: where that is no other model.
        """
        scaling = self.rope_scaling
        if scaling is None or scaling.kind != "longrope" or self.context >= self.max_position_embeddings:
            raise InputError(
                f"long_context changes nothing for this {self.model_type}, whose context is {self.context}; leave it "
                "out"
            )
        return dataclasses.replace(self, rope_scaling=dataclasses.replace(scaling, long=True))

    @property
    def rotary(self) -> Rotary:
        """Of the layers that have no other."""
        return Rotary(self.rope_theta, self.head_dim, self.rope_scaling)

    @property
    def attention_kinds(self) -> tuple[AttentionKind, ...]:
        """Of each layer. An adapter has that of the first."""
        rotary = self.rotary
        return tuple(AttentionKind(rotary, window) for window in self.windows or (None,) * self.num_hidden_layers)

    @property
    def attention_scale(self) -> float:
        """What scores are multiplied by."""
        return self.head_dim**-0.5

    @property
    def queries_per_kv(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads
