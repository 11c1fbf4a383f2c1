"""A training run's settings: read from a config file and the command line, compared with a checkpoint's.

`TrainConfig` (config.py) is the schema. A config file's `get_config` returns an ml_collections `ConfigDict`, which absl
can override by flags; `check_config` turns it into a `TrainConfig`.
"""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

import ml_collections
from jax.sharding import Mesh

from kangaroo_jax import paths
from kangaroo_jax.checkpoint.adapter import check_exit_layer
from kangaroo_jax.config import TrainConfig
from kangaroo_jax.errors import InputError
from kangaroo_jax.model import sharding
from kangaroo_jax.model.config import ModelConfig

# Settings that change a run's results, besides the target and the data, which have fingerprints.
_FIXED = (
    "exit_layer",
    "adapter.kind",
    "adapter.num_layers",
    "adapter.mlp_size",
    "teacher",
    "dtype",
    "weights",
    "seed",
    "batch_size",
    "sequence_length",
    "loss",
    "cross_entropy_steps",
    "draft_vocabulary",
    "initialization",
)


def config_dict(**settings: Any) -> ml_collections.ConfigDict:
    """What a config file's `get_config` returns: the defaults of `TrainConfig` with `settings` in their place.

        config_dict(target="folder", output="runs/name", data={"files": "data/*.jsonl"})

    Raises:
      InputError: as `check_config`.
    """
    return ml_collections.ConfigDict(dataclasses.asdict(_made(TrainConfig, settings)))


def check_config(config: ml_collections.ConfigDict) -> TrainConfig:
    """The settings of a config file. One that is left out has its default.

    Raises:
      InputError: for a setting that is unknown, of the wrong type or out of range, or one without a default that is
        left out.
    """
    return _made(TrainConfig, config.to_dict())


def check_overrides(argv: Sequence[str]) -> None:
    """Raises `InputError` for a --config.NAME on the command line that is no setting. Call it before absl parses the
    flags: absl's message names neither the section nor a similar setting in another section."""
    for word in argv:
        found = re.match(r"--?config\.([^=]+)", word)
        if found and found.group(1) not in _names(TrainConfig):
            raise InputError(f"{found.group()}: there is no such setting{_nearest(found.group(1))}")


def flat(config: TrainConfig) -> dict[str, Any]:
    """The settings by dotted name, such as `optimizer.learning_rate`: the form in checkpoints' metadata."""
    return _flat(dataclasses.asdict(config))


def check_target_folder(config: TrainConfig) -> None:
    """Raises `InputError` for a target that is a path (not a hub id) to no checkpoint."""
    path = paths.expanded(config.target)
    if (path.is_absolute() or config.target.startswith(".")) and not (path.is_dir() or path.suffix == ".gguf"):
        raise InputError(
            f"{config.target}: no such folder; expected a target in Hugging Face format, a GGUF file or a hub id"
        )


def check_context(config: TrainConfig, model: ModelConfig, name: str) -> None:
    """Raises `InputError` for sequences that are longer than the context of the target called `name`."""
    context = model.context
    if config.sequence_length > context:
        raise InputError(
            f"sequence_length: expected at most {context}, the context of {name}; found {config.sequence_length}"
        )


def check_adapter(config: TrainConfig, model: ModelConfig) -> None:
    """Raises `InputError` for an exit layer that a target with `model` does not have, or an adapter with more layers
    than it has deep ones."""
    check_exit_layer(config.exit_layer, model)
    deep = model.num_hidden_layers - config.exit_layer
    if config.adapter.num_layers > deep:
        raise InputError(
            f"adapter.num_layers: expected at most {deep}, the target's layers from exit_layer {config.exit_layer} on, "
            f"found {config.adapter.num_layers}"
        )


def check_same_run(config: TrainConfig, stored: dict[str, Any], folder: pathlib.Path) -> None:
    """Raises `InputError` if continuing a run would not give the result that the settings ask for.

    Args:
      config: the settings asked for.
      stored: those that the run was started with, as `flat` gives them.
      folder: the checkpoint, for the message.
    """
    settings = flat(config)
    fixed = [name for name in settings if name in _FIXED or name.startswith("optimizer.")]
    if config.optimizer.schedule == "cosine":
        fixed.append("steps")  # the schedule depends on it
    # A run from before a setting was added was trained as its default says, or said then.
    stored = _defaults() | {"adapter.kind": "kangaroo"} | stored
    for name in fixed:
        if settings[name] != stored.get(name):
            raise InputError(
                f"{folder}: a run with other settings; expected {name} {settings[name]}, found {stored.get(name)}; "
                "give the same settings to go on with it, or another output"
            )


def make_mesh(config: TrainConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that the settings ask for, over all devices of the run by default.

    Raises:
      InputError: for sizes that do not fit the devices or the batch.
    """
    mesh = sharding.make_mesh(dataclasses.asdict(config.mesh), devices)
    sharding.check_batch_size(config.batch_size, mesh)
    return mesh


def _made(kind: type, given: Any, section: str = "") -> Any:
    """A dataclass of settings from a mapping. `section` is the prefix of its fields' names, such as "data."."""
    if not isinstance(given, Mapping):
        raise InputError(f"config: {section.removesuffix('.')}: expected several settings, found {given!r}")
    hints = get_type_hints(kind)
    for name in given:
        if name not in hints:
            raise InputError(f"config: {section}{name} is not a setting{_nearest(f'{section}{name}')}")
    values = dict(given)
    for field in dataclasses.fields(kind):
        name, nested = field.name, dataclasses.is_dataclass(hints[field.name])
        if nested:
            values[name] = _made(hints[name], values.get(name, {}), f"{section}{name}.")
        elif name not in values and field.default is dataclasses.MISSING:
            raise InputError(f"config: {section}{name} is missing; expected a value of type {hints[name].__name__}")
    return kind(**values)


def _names(kind: type, section: str = "") -> list[str]:
    """The dotted names of all settings."""
    names = []
    for name, hint in get_type_hints(kind).items():
        names += _names(hint, f"{section}{name}.") if dataclasses.is_dataclass(hint) else [section + name]
    return names


def _nearest(name: str) -> str:
    """The end of a message about an unknown name: the most similar setting, compared first without sections, then with
    them. If `name` is a section, its settings; if nothing is similar, all settings."""
    names = _names(TrainConfig)
    inside = [known for known in names if known.startswith(f"{name}.")]
    without = {known.rpartition(".")[2]: known for known in names}
    close = [without[found] for found in difflib.get_close_matches(name.rpartition(".")[2], without, 1)]
    close = close or difflib.get_close_matches(name, names, 1)
    if close and not inside:
        return f"; did you mean {close[0]}?"
    return f"; expected one of {', '.join(inside or names)}"


def _defaults() -> dict[str, Any]:
    """As `flat`, of the settings that have a default."""
    fields = (field for field in dataclasses.fields(TrainConfig) if field.default is not dataclasses.MISSING)
    values = ((field.name, field.default) for field in fields)
    return _flat({name: dataclasses.asdict(x) if dataclasses.is_dataclass(x) else x for name, x in values})


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flattened = {}
    for name, value in nested.items():
        flattened |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flattened
