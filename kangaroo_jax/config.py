"""Settings as frozen dataclasses, validated on construction.

`ModelConfig` describes a target and is read from a Hugging Face `config.json`; `DraftConfig` says how to draft (with
`TreeConfig`, a tree), `SamplingConfig` how to choose tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from kangaroo_jax.errors import InputError

ARCHITECTURES = ("llama", "mistral", "qwen2")


def _check_count(name: str, value: Any) -> None:
    # bool is an int to Python, but `true` in a JSON file is a mistake here.
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} must be a positive integer, found {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_positive(name: str, value: Any) -> None:
    if not _is_number(value) or not 0 < value < math.inf:
        raise InputError(f"{name} must be a finite number above 0, found {value!r}")


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise InputError(f"{name} must be true or false, found {value!r}")


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
        _check_positive("rope factor", self.factor)
        _check_positive("rope low_freq_factor", self.low_freq_factor)
        _check_positive("rope high_freq_factor", self.high_freq_factor)
        _check_count("rope original_max_position_embeddings", self.original_max_position_embeddings)
        if self.high_freq_factor <= self.low_freq_factor:
            raise InputError(
                f"rope high_freq_factor must be above low_freq_factor ({self.low_freq_factor}), "
                f"found {self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of a target of the Llama family. Field names are Hugging Face's.

    `qkv_bias`, `o_bias` and `mlp_bias` say which projections carry a bias (Llama's `attention_bias` sets the first
    two, Qwen2 has the first only).

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
            _check_count(name, getattr(self, name))
        for name in ("rms_norm_eps", "rope_theta"):
            _check_positive(name, getattr(self, name))
        for name in ("tie_word_embeddings", "qkv_bias", "o_bias", "mlp_bias"):
            _check_flag(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads must be a multiple of num_key_value_heads ({self.num_key_value_heads}), "
                f"found {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim must be even for rotary embeddings, found {self.head_dim}")

    @property
    def queries_per_kv(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
        """Reads the contents of a Hugging Face `config.json`.

        A key that is left out means what transformers takes it to mean (its models/*/configuration_*.py).

        Args:
          config: the parsed file.
          source: its name, for error messages.

        Raises:
          InputError: naming `source`, the key, what was found and what is supported.
        """
        try:
            return cls._from_hf(config)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None

    @classmethod
    def _from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        model_type = config.get("model_type")
        if model_type not in ARCHITECTURES:
            raise InputError(f"model_type {model_type!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
        _refuse_unsupported(config, model_type)
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            _check_count(key, config.get(key))
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        head_dim = config.get("head_dim")
        if head_dim is None:
            if hidden % heads:
                raise InputError(
                    f"hidden_size must be a multiple of num_attention_heads ({heads}) where head_dim is not given, "
                    f"found {hidden}"
                )
            head_dim = hidden // heads
        kv_heads = config.get("num_key_value_heads", _DEFAULT_KV_HEADS.get(model_type))
        theta, scaling = _rope_from_hf(config)
        attention_bias = _flag(config, "attention_bias")
        bos = token_ids(config, "bos_token_id", _DEFAULT_BOS.get(model_type))
        if len(bos) > 1:
            raise InputError(f"bos_token_id must be one token id or null, found {config['bos_token_id']!r}")
        return cls(
            model_type=model_type,
            vocab_size=config["vocab_size"],
            hidden_size=hidden,
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=heads if kv_heads is None else kv_heads,
            head_dim=head_dim,
            max_position_embeddings=config.get("max_position_embeddings", _DEFAULT_CONTEXT[model_type]),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=_flag(config, "tie_word_embeddings"),
            # transformers reads the bias keys for Llama alone: Mistral has no biases, Qwen2 always those of q, k, v.
            qkv_bias=model_type == "qwen2" or (model_type == "llama" and attention_bias),
            o_bias=model_type == "llama" and attention_bias,
            mlp_bias=model_type == "llama" and _flag(config, "mlp_bias"),
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=token_ids(config, "eos_token_id", _DEFAULT_EOS.get(model_type)),
        )


# What transformers assumes where a config.json leaves a key out.
_DEFAULT_CONTEXT = {"llama": 2048, "mistral": 4096 * 32, "qwen2": 32768}
_DEFAULT_KV_HEADS = {"mistral": 8, "qwen2": 32}
_DEFAULT_BOS = {"llama": 1, "mistral": 1}
_DEFAULT_EOS = {"llama": 2, "mistral": 2}
_MISTRAL_SLIDING_WINDOW = 4096


def token_ids(config: Mapping[str, Any], key: str, default: int | None = None) -> tuple[int, ...]:
    """The ids under `key` of a Hugging Face config: none (null), one, or a list; `default` where it is left out.

    Raises:
      InputError: for anything but integers.
    """
    value = config.get(key, default)
    ids = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise InputError(f"{key} must be a token id or a list of token ids, found {value!r}")
    return ids


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if value is None:
        return False
    _check_flag(key, value)
    return value


def _refuse_unsupported(config: Mapping[str, Any], model_type: str) -> None:
    """Settings that transformers honours and the model here does not have."""
    if model_type == "mistral":
        window = config.get("sliding_window", _MISTRAL_SLIDING_WINDOW)
        if window is not None:
            default = "" if "sliding_window" in config else " (the default of a config without the key)"
            raise InputError(
                f"mistral with sliding_window {window!r}{default} is not supported; "
                "only full attention is (sliding_window: null)"
            )
    if model_type == "qwen2":
        if _flag(config, "use_sliding_window"):
            raise InputError("qwen2 with use_sliding_window true is not supported; only full attention is")
        layer_types = config.get("layer_types") or []
        if any(kind != "full_attention" for kind in layer_types):
            raise InputError(f"layer_types {layer_types!r} is not supported; only 'full_attention' is, in every layer")
    # ACT2FN in transformers knows SiLU by both names.
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise InputError(f"hidden_act {config['hidden_act']!r} is not supported; supported: silu")
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise InputError(f"quantized weights ({method!r}) are not supported; use the unquantized checkpoint")
    if config.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise InputError(f"partial_rotary_factor must be 1, found {config['partial_rotary_factor']!r}")


def _rope_from_hf(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling, in the old spelling (`rope_theta`, `rope_scaling.type`) or the new
    (`rope_parameters.rope_theta`, `.rope_type`)."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"  # transformers' precedence
    parameters = config.get(key) or {}
    if not isinstance(parameters, Mapping):
        raise InputError(f"{key} must be an object, found {parameters!r}")
    nested = [name for name, value in parameters.items() if isinstance(value, Mapping)]
    if nested:
        raise InputError(f"{key} that differs between layers ({nested[0]!r}) is not supported; use one for all layers")
    if parameters.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise InputError(f"{key}.partial_rotary_factor must be 1, found {parameters['partial_rotary_factor']!r}")
    theta = parameters.get("rope_theta")
    theta = config.get("rope_theta") if theta is None else theta
    theta = 10000.0 if theta is None else theta
    _check_positive("rope_theta", theta)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind is None or kind == "default":
        return float(theta), None
    if kind not in ("linear", "llama3"):
        raise InputError(f"rope type {kind!r} is not supported; supported: default, linear, llama3")
    fields = ["factor"]
    if kind == "llama3":
        fields += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    for field in fields:
        if field not in parameters:
            raise InputError(f"{key} of rope type {kind!r} needs {field!r}, found {sorted(parameters)}")
    return float(theta), RopeScaling(kind, **{field: parameters[field] for field in fields})


@dataclasses.dataclass(frozen=True)
class TreeConfig:
    """The shape of a drafted tree (paper, NeurIPS version).

    Attributes:
      topk: K, the most nodes of a level that are drafted on from, and the children that each of them gets.
      budget: M, the most drafted tokens that a round verifies: the likeliest of the tree.

    Raises:
      InputError: for a value out of range.
    """

    topk: int = 10
    budget: int = 32

    def __post_init__(self) -> None:
        _check_count("tree_topk", self.topk)
        _check_count("tree_budget", self.budget)

    def drafted(self, levels: int) -> int:
        """The most tokens of a tree of so many levels that are verified: what a draft holds, what verification passes
        over and what the caches reserve room for. The first level has K candidates, each later one K^2."""
        return min(self.budget, self.topk + (levels - 1) * self.topk**2)


@dataclasses.dataclass(frozen=True)
class DraftConfig:
    """How a round drafts (paper, section 3.2).

    Attributes:
      exit_layer: number of shallow layers l; None means the one the adapter was trained for.
      max_draft_len: gamma, the most tokens drafted in a round one after another: the depth of a tree.
      threshold: eta; drafting stops after a token whose top-1 draft probability was below it, and in a tree at a depth
        where no path has this probability. 0 never stops early.
      tree: None drafts a single sequence.

    Raises:
      InputError: for a value out of range.
    """

    exit_layer: int | None = None
    max_draft_len: int = 6
    threshold: float = 0.6
    tree: TreeConfig | None = None

    def __post_init__(self) -> None:
        if self.exit_layer is not None:
            _check_count("exit_layer", self.exit_layer)
        _check_count("max_draft_len", self.max_draft_len)
        if not _is_number(self.threshold) or not 0.0 <= self.threshold <= 1.0:
            raise InputError(f"threshold must be between 0 and 1, found {self.threshold!r}")
        if self.tree is not None and self.tree.budget < self.max_draft_len:
            raise InputError(
                f"tree_budget must be at least max_draft_len ({self.max_draft_len}), or the deepest path cannot be "
                f"verified; found {self.tree.budget}"
            )

    def __str__(self) -> str:
        """How a report names it: gamma, eta, and a tree's shape."""
        shape = "" if self.tree is None else f", trees of K {self.tree.topk} and budget {self.tree.budget}"
        return f"gamma {self.max_draft_len}, eta {self.threshold}{shape}"


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen from the target's distribution. The default is greedy decoding.

    The same prompt and seed give the same text whatever else is in the batch; so prompts that are equal, with one
    seed, give equal texts. For several samples of one prompt, give it several times, with a seed for each.

    Attributes:
      temperature: logits are divided by it; 0 is greedy, and the other settings then have no effect.
      top_p: the fewest most probable tokens that have this much probability together are kept; 1 keeps all.
      top_k: this many most probable tokens are kept; 0 keeps all. Comes before top_p, as in transformers.
      seed: one for all prompts, or a sequence of one per prompt; 0 to 2**32 - 1.

    Raises:
      InputError: for a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | Sequence[int] = 0

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature must be a finite number, 0 or above, found {self.temperature!r}")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, found {self.top_p!r}")
        if not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 0:
            raise InputError(f"top_k must be an integer, 0 or above, found {self.top_k!r}")
        several = isinstance(self.seed, Sequence) and not isinstance(self.seed, str)
        for seed in self.seed if several else (self.seed,):
            if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
                raise InputError(f"seed must be an integer from 0 to 2**32 - 1, found {seed!r}")
        if several:
            object.__setattr__(self, "seed", tuple(self.seed))  # hashable, whatever sequence was given
