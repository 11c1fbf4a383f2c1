"""What families share in reading and writing a Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from kangaroo_jax.checks import check_count, check_flag, check_positive, check_size, is_integer
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.config import ROPE_KINDS, ModelConfig, RopeScaling

# Fields of `ModelConfig` that are no keys of a config.json.
_OWN_FIELDS = ("rope_scaling", "qkv_bias", "o_bias", "mlp_bias", "eos_token_ids", "windows")

_MOST_LAYERS = 10_000  # a file that has more is damaged, and lists of them would take the memory
_UNUSED_WINDOW = 4096  # transformers wants one, even where no layer has it
_FULL, _SLIDING = "full_attention", "sliding_attention"
_ORIGINAL = "original_max_position_embeddings"

# Fields of `RopeScaling` besides its factor, by kind: those that it must have, and those it may.
_NEEDED: dict[str, tuple[str, ...]] = {
    "linear": (),
    "dynamic": (),
    "llama3": ("low_freq_factor", "high_freq_factor", _ORIGINAL),
    "yarn": (_ORIGINAL,),
    "longrope": (_ORIGINAL, "short_factor", "long_factor"),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "linear": (),
    "dynamic": (),
    "llama3": (),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "truncate"),
    "longrope": ("attention_factor",),
}
_SCALING = sorted({"factor"}.union(*_NEEDED.values(), *_OPTIONAL.values()) - {_ORIGINAL})


def shared_fields(
    contents: Mapping[str, Any],
    *,
    max_positions: int,
    kv_heads: int | None = None,
    bos: int | None = None,
    eos: int | None = None,
    tied: bool = False,
    eps: float = 1e-6,
    theta: float = 10000.0,
    rope: Mapping[str, Any] | None = None,
    turns_parts: bool = False,
    has_windows: bool = True,
) -> dict[str, Any]:
    """The fields of `ModelConfig` but for biases and windows, of a config.json's contents.

    Args:
      contents: of the file, parsed.
      max_positions: the family's max_position_embeddings where the key is left out.
      kv_heads: num_key_value_heads likewise; None means as many as there are heads.
      bos: bos_token_id likewise.
      eos: eos_token_id likewise.
      tied: tie_word_embeddings likewise.
      eps: rms_norm_eps likewise.
      theta: rope_theta likewise.
      rope: the keys of `contents` that say how positions turn queries and keys; None means `contents`.
      turns_parts: whether the family's rotary takes partial_rotary_factor.
      has_windows: whether the family's layers may have windows.

    Raises:
      InputError: for a key that is missing or has a wrong value, and for what no model here computes.
    """
    quantization = contents.get("quantization_config")
    if quantization:
        raise InputError(
            f"quantized weights ({_quantization_method(quantization)!r}) are not supported; use the unquantized "
            "checkpoint"
        )
    if contents.get("per_layer_config"):
        raise InputError("per_layer_config is not supported: settings are the same for all layers")
    if not has_windows:
        _refuse_window(contents, contents.get("max_position_embeddings", max_positions))
    if contents.get("is_causal") is False:
        raise InputError("is_causal false is not supported: tokens see those before them alone")
    if contents.get("vision_config"):
        raise InputError("a model with a vision tower (vision_config) is not supported; give a model of text alone")
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        check_size(key, contents.get(key))
    if contents["num_hidden_layers"] > _MOST_LAYERS:
        raise InputError(f"num_hidden_layers must be at most {_MOST_LAYERS}, found {contents['num_hidden_layers']}")
    hidden, heads = contents["hidden_size"], contents["num_attention_heads"]
    head_dim = contents.get("head_dim")
    if head_dim is None:
        if hidden % heads:
            raise InputError(
                f"hidden_size must be a multiple of num_attention_heads ({heads}) where head_dim is not given, "
                f"found {hidden}"
            )
        head_dim = hidden // heads
    kv_heads = contents.get("num_key_value_heads", kv_heads)
    max_positions = contents.get("max_position_embeddings", max_positions)
    parts = partial_rotary_factor(contents if rope is None else rope)
    if parts != 1 and not turns_parts:
        raise InputError(f"partial_rotary_factor must be 1 for {contents['model_type']}, found {parts!r}")
    theta, scaling = rotary_settings(contents if rope is None else rope, theta, max_positions)
    first = token_ids(contents, "bos_token_id", bos)
    if len(first) > 1:
        raise InputError(f"bos_token_id must be one token id or null, found {contents['bos_token_id']!r}")
    return {
        "model_type": contents["model_type"],
        "vocab_size": contents["vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": contents["intermediate_size"],
        "num_hidden_layers": contents["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": heads if kv_heads is None else kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": contents.get("rms_norm_eps", eps),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": flag(contents, "tie_word_embeddings", tied),
        "bos_token_id": first[0] if first else None,
        "eos_token_ids": token_ids(contents, "eos_token_id", eos),
    }


def _quantization_method(quantization: Any) -> Any:
    """What a config.json's quantization_config calls its method; bitsandbytes once gave only flags such as
    load_in_4bit."""
    if not isinstance(quantization, Mapping):
        return quantization
    flags = (key for key, value in quantization.items() if value is True)
    return quantization.get("quant_method") or next(flags, "a method without a name")


def shared_keys(config: ModelConfig) -> dict[str, Any]:
    """The keys of a config.json that `shared_fields` reads."""
    keys = [field.name for field in dataclasses.fields(ModelConfig) if field.name not in _OWN_FIELDS]
    eos = config.eos_token_ids
    return {key: getattr(config, key) for key in keys} | {
        "hidden_act": "silu",
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        "rope_scaling": rotary_keys(config.rope_scaling),
    }


def rotary_keys(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """The keys of a config.json's `rope_scaling` that `rotary_settings` reads; None without one."""
    if scaling is None:
        return None
    values = {name: getattr(scaling, name) for name in ("factor", *_NEEDED[scaling.kind], *_OPTIONAL[scaling.kind])}
    return {"rope_type": scaling.kind} | {name: list(x) if isinstance(x, tuple) else x for name, x in values.items()}


def layer_windows(
    contents: Mapping[str, Any], window: int | None, default: Callable[[int], bool]
) -> tuple[int | None, ...]:
    """`ModelConfig.windows`.

    Args:
      contents: of the config.json. Its layer_types say which layers have a window.
      window: of those; None where no layer has one.
      default: whether the layer of an index has one, where there are no layer_types.

    Raises:
      InputError: for kinds of layers that no model here has.
    """
    layers = contents["num_hidden_layers"]
    kinds = contents.get("layer_types")
    if kinds is None:
        kinds = [_SLIDING if default(i) else _FULL for i in range(layers)]
    if not isinstance(kinds, list) or not set(map(str, kinds)) <= {_SLIDING, _FULL} or len(kinds) != layers:
        raise InputError(
            f"layer_types must be a list of {_FULL!r} and {_SLIDING!r}, one for each of {layers} layers, "
            f"found {kinds!r}"
        )
    if window is None and contents.get("layer_types") is not None and _SLIDING in kinds:
        why = "there is no sliding_window" if contents.get("sliding_window") is None else "use_sliding_window is false"
        raise InputError(f"layer_types has {_SLIDING!r}, but {why}; change that, or give {_FULL!r} alone")
    if _SLIDING in kinds and window is not None:
        check_count("sliding_window", window)
        return tuple(window if kind == _SLIDING else None for kind in kinds)
    return ()


def window_keys(config: ModelConfig) -> dict[str, Any]:
    """The keys of a config.json that say which layers have a window."""
    kinds = [_FULL if window is None else _SLIDING for window in config.windows] or [_FULL] * config.num_hidden_layers
    window = next((x for x in config.windows if x is not None), _UNUSED_WINDOW)
    return {"layer_types": kinds, "sliding_window": window}


def require_silu(contents: Mapping[str, Any]) -> None:
    """Raises `InputError` for an activation of the MLP that is not SiLU."""
    # ACT2FN in transformers knows SiLU by both names.
    if contents.get("hidden_act", "silu") not in ("silu", "swish"):
        raise InputError(f"hidden_act {contents['hidden_act']!r} is not supported; supported: silu")


def flag(contents: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """The flag under `key`; `default` where it is left out, false where it is null.

    Raises:
      InputError: for anything but true and false.
    """
    value = contents.get(key, default)
    if value is None:
        return False
    check_flag(key, value)
    return value


def token_ids(contents: Mapping[str, Any], key: str, default: int | None = None) -> tuple[int, ...]:
    """The ids under `key` of a config.json (or generation_config.json): none (null), one, or a list; `default` where it
    is left out.

    Raises:
      InputError: for anything but integers.
    """
    value = contents.get(key, default)
    ids = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise InputError(f"{key} must be a token id or a list of token ids, found {value!r}")
    return ids


def partial_rotary_factor(contents: Mapping[str, Any]) -> float:
    """The share of a head's dimensions that positions turn."""
    value = _parameters(contents).get("partial_rotary_factor", contents.get("partial_rotary_factor"))
    value = 1.0 if value is None else value
    check_positive("partial_rotary_factor", value)
    return value


def rotary_settings(contents: Mapping[str, Any], theta: float, max_positions: int) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling, in the old spelling (`rope_theta`, `rope_scaling.type`) or the new
    (`rope_parameters.rope_theta`, `.rope_type`).

    Args:
      contents: the keys of a config.json.
      theta: rope_theta where it is left out.
      max_positions: the model's max_position_embeddings.

    Raises:
      InputError: for settings that are wrong, or that no model here has.
    """
    key, parameters = _rope_key(contents), _parameters(contents)
    nested = [name for name, value in parameters.items() if isinstance(value, Mapping)]
    if nested:
        raise InputError(
            f"{key} that differs between layers ({nested[0]!r}) is not supported for this model_type; "
            "use one for all layers"
        )
    found = parameters.get("rope_theta")
    found = contents.get("rope_theta") if found is None else found
    theta = theta if found is None else found
    check_positive("rope_theta", theta)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        scaled = [name for name in _SCALING if parameters.get(name) is not None]
        if scaled:
            raise InputError(f"{key} has {scaled[0]!r} but no rope_type that takes it; give one, or leave it out")
        return float(theta), None
    if not isinstance(kind, str) or kind not in ROPE_KINDS:
        raise InputError(f"rope type {kind!r} is not supported; supported: default, {', '.join(ROPE_KINDS)}")
    if kind == "yarn" and parameters.get("truncate", True) is None:  # false for transformers, but not everywhere
        raise InputError("rope truncate must be true or false, found null")
    given = {name: value for name, value in parameters.items() if value is not None}
    # transformers: a key beside the parameters, which Phi has, comes first; the complete context is the default.
    original = contents.get(_ORIGINAL)
    if kind in ("llama3", "yarn", "longrope"):
        given[_ORIGINAL] = original or given.get(_ORIGINAL, max_positions)
        check_size(_ORIGINAL, given[_ORIGINAL])
    if kind in ("yarn", "longrope"):
        check_size("max_position_embeddings", max_positions)
        given.setdefault("factor", max_positions / given[_ORIGINAL])
    for field in ("factor", *_NEEDED[kind]):
        if field not in given:
            raise InputError(f"{key} of rope type {kind!r} needs {field!r}, found {sorted(parameters)}")
    if kind in ("yarn", "longrope"):
        check_positive("rope factor", given["factor"])
        given.setdefault("attention_factor", _attention_factor(kind, given))
    for field in ("short_factor", "long_factor"):
        if field in given and not isinstance(given[field], list):
            raise InputError(f"{key}.{field} must be a list of numbers, found {given[field]!r}")
        if field in given:
            given[field] = tuple(given[field])
    fields = ("factor", *_NEEDED[kind], *_OPTIONAL[kind])
    return float(theta), RopeScaling(kind, **{field: given[field] for field in fields if field in given})


def _attention_factor(kind: str, given: Mapping[str, Any]) -> float:
    """What cosines and sines are multiplied by where the file does not say."""
    factor = given["factor"]
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        if given[_ORIGINAL] == 1:
            raise InputError(f"{_ORIGINAL} must be above 1 for rope type 'longrope', found 1")
        return math.sqrt(1 + math.log(factor) / math.log(given[_ORIGINAL]))
    scales = [given.get("mscale"), given.get("mscale_all_dim")]
    if not all(scales):
        return 0.1 * math.log(factor) + 1
    for scale in scales:
        check_positive("rope mscale", scale)
    above, below = (0.1 * scale * math.log(factor) + 1 for scale in scales)
    return above / below


def _refuse_window(contents: Mapping[str, Any], max_positions: int) -> None:
    """Raises `InputError` for a window in a family without any: transformers would cut its cache, and not its mask."""
    window, kinds = contents.get("sliding_window"), contents.get("layer_types")
    check_count("max_position_embeddings", max_positions)
    for name, value, kept in (
        ("sliding_window", window, window is None or (is_integer(window) and window >= max_positions)),
        ("layer_types", kinds, kinds is None or (isinstance(kinds, list) and set(map(str, kinds)) <= {_FULL})),
    ):
        if not kept:
            raise InputError(
                f"{name} {value!r:.60} is not supported for {contents['model_type']}, whose layers see all positions"
            )


def _rope_key(contents: Mapping[str, Any]) -> str:
    return "rope_scaling" if contents.get("rope_scaling") else "rope_parameters"  # transformers' precedence


def _parameters(contents: Mapping[str, Any]) -> Mapping[str, Any]:
    key = _rope_key(contents)
    parameters = contents.get(key) or {}
    if not isinstance(parameters, Mapping):
        raise InputError(f"{key} must be an object, found {parameters!r}")
    return parameters
