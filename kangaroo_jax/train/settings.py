"""The settings of a training run: which there are, and what is wrong with those given."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_collections
from jax.sharding import Mesh

from kangaroo_jax.data import chat
from kangaroo_jax.errors import InputError
from kangaroo_jax.model import sharding
from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.train.objective import LOSSES
from kangaroo_jax.train.step import INITIALIZATIONS

_SETTINGS: dict[str, type] = {
    "target": str,
    "dtype": str,
    "exit_layer": int,
    "teacher": str,
    "output": str,
    "seed": int,
    "steps": int,
    "batch_size": int,
    "sequence_length": int,
    "loss_chunk": int,
    "loss": str,
    "initialization": str,
    "data.files": str,
    "data.evaluation_files": str,
    "data.held_out": float,
    "data.template": str,
    "data.cache": str,
    "data.max_bad_share": float,
    "optimizer.learning_rate": float,
    "optimizer.warmup_steps": int,
    "optimizer.schedule": str,
    "optimizer.weight_decay": float,
    "optimizer.clip_norm": float,
    "log_every": int,
    "evaluate_every": int,
    "evaluation_windows": int,
    "save_every": int,
    "keep_checkpoints": int,
    "mesh.data": int,
    "mesh.fsdp": int,
    "mesh.model": int,
}
_MAY_BE_ZERO = {"seed", "data.max_bad_share", "optimizer.warmup_steps", "optimizer.weight_decay"}
_MAY_BE_THE_REST = {"mesh.data", "mesh.fsdp", "mesh.model"}  # -1
# float16 is for decoding only: the gradients of a mean over a batch underflow in it.
_CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "teacher": ("online", "cached"),
    "optimizer.schedule": ("constant", "cosine"),
    "loss": tuple(LOSSES),
    "initialization": INITIALIZATIONS,
    "data.template": (*chat.NAMED, ""),
}
# What a run's results follow from, with the target and the data, which have fingerprints.
_FIXED = ("exit_layer", "teacher", "dtype", "seed", "batch_size", "sequence_length", "loss", "initialization")


def check_config(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The settings by dotted name, checked.

    Raises:
      InputError: for a setting that is missing, unknown, of the wrong type or out of range.
    """
    settings = _flat(config.to_dict())
    for name in settings:
        if name not in _SETTINGS:
            raise InputError(f"config: {name} is not a setting; expected {', '.join(_SETTINGS)}")
    for name, kind in _SETTINGS.items():
        if name not in settings:
            raise InputError(f"config: {name} is missing; expected a value of type {kind.__name__}")
        value = settings[name]
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise InputError(f"{name}: expected a value of type {kind.__name__}, found {value!r}")
        if name in _MAY_BE_THE_REST and value == -1:
            continue
        if kind is not str and not (0 < value < math.inf or (value == 0 and name in _MAY_BE_ZERO)):
            least = "zero or more" if name in _MAY_BE_ZERO else "more than zero"
            raise InputError(f"{name}: expected a number that is {least}, found {value}")
        if name in _CHOICES and value not in _CHOICES[name]:
            raise InputError(f"{name}: expected {' or '.join(_CHOICES[name])}, found {value!r}")
    for name in ("target", "output", "data.files"):
        if not settings[name].strip():
            raise InputError(f"{name}: empty; give one with --config.{name}=...")
    if "://" in settings["output"]:
        raise InputError(
            f"output: expected a folder, found {settings['output']}; mount the bucket, or name a local folder"
        )
    if settings["data.held_out"] > 0.5:
        raise InputError(f"data.held_out: expected a share of at most 0.5, found {settings['data.held_out']}")
    if settings["seed"] >= 2**32:
        raise InputError(f"seed: expected less than 2**32, found {settings['seed']}")
    if settings["optimizer.warmup_steps"] >= settings["steps"]:
        raise InputError(
            f"optimizer.warmup_steps: expected less than steps ({settings['steps']}), "
            f"found {settings['optimizer.warmup_steps']}"
        )
    # Before the data files are looked for, so that the first of two mistakes is the first to be named.
    target = pathlib.Path(settings["target"]).expanduser()
    if (target.is_absolute() or settings["target"].startswith(".")) and not target.is_dir():
        raise InputError(f"{settings['target']}: no such folder; expected a target in Hugging Face format or a hub id")
    return settings


def check_context(settings: dict[str, Any], config: ModelConfig, name: str) -> None:
    """Raises `InputError` for sequences that are longer than the context of the target called `name`."""
    context = config.max_position_embeddings
    if settings["sequence_length"] > context:
        raise InputError(
            f"sequence_length: expected at most {context}, the context of {name}; found {settings['sequence_length']}"
        )


def check_same_run(settings: dict[str, Any], stored: dict[str, Any], folder: pathlib.Path) -> None:
    """Raises `InputError` where going on with a run would not give what the settings ask for."""
    fixed = [name for name in _SETTINGS if name in _FIXED or name.startswith("optimizer.")]
    if settings["optimizer.schedule"] == "cosine":
        fixed.append("steps")  # the rate's course was laid out for them
    for name in fixed:
        if settings[name] != stored.get(name):
            raise InputError(
                f"{folder}: a run with other settings; expected {name} {settings[name]}, found {stored.get(name)}; "
                "give the same settings to go on with it, or another output"
            )


def make_mesh(settings: dict[str, Any], devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that the settings ask for, over all devices of the run by default.

    Raises:
      InputError: for sizes that do not fit the devices or the batch.
    """
    mesh = sharding.make_mesh({axis: settings[f"mesh.{axis}"] for axis in sharding.AXES}, devices)
    sharding.check_batch_size(settings["batch_size"], mesh)
    return mesh


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in nested.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
