"""Settings of training runs: what a config file may say, what is refused, and which runs go on."""

import dataclasses
import importlib.util
import pathlib
import re
from typing import get_args, get_type_hints

import pytest

from kangaroo_jax.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from kangaroo_jax.data import chat
from kangaroo_jax.errors import InputError
from kangaroo_jax.train.objective import LOSSES
from kangaroo_jax.train.settings import check_config, check_same_run, config_dict, flat

from .runs import ROOT, configured, demo_config

# What the metadata of a checkpoint holds that was written before there was a TrainConfig.
EARLIER = {
    "batch_size": 16,
    "data.cache": "",
    "data.evaluation_files": "",
    "data.files": "stdlib",
    "data.held_out": 0.02,
    "data.max_bad_share": 0.01,
    "data.template": "",
    "dtype": "float32",
    "evaluate_every": 100,
    "evaluation_windows": 64,
    "exit_layer": 2,
    "initialization": "layer",
    "keep_checkpoints": 2,
    "log_every": 10,
    "loss": "total_variation",
    "loss_chunk": 64,
    "mesh.data": 1,
    "mesh.fsdp": -1,
    "mesh.model": 1,
    "optimizer.clip_norm": 0.5,
    "optimizer.learning_rate": 0.001,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_steps": 100,
    "optimizer.weight_decay": 0.01,
    "output": "runs/demo",
    "save_every": 100,
    "seed": 0,
    "sequence_length": 256,
    "steps": 800,
    "target": "kangaroo_jax/demo/model",
    "teacher": "online",
}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("exit_layer", 0, "exit_layer: expected a number that is more than zero, found 0"),
        ("batch_size", -1, "batch_size: expected a number that is more than zero, found -1"),
        ("seed", -1, "seed: expected a number that is zero or more, found -1"),
        ("seed", 2**32, r"seed: expected less than 2\*\*32, found 4294967296"),
        ("dtype", "float8", "dtype: expected float32 or bfloat16, found 'float8'"),
        ("teacher", "offline", "teacher: expected online or cached, found 'offline'"),
        ("loss", "mse", "loss: expected cross_entropy or total_variation or both, found 'mse'"),
        ("initialization", "zero", "initialization: expected layer or zero_output or random, found 'zero'"),
        ("optimizer.schedule", "linear", "optimizer.schedule: expected constant or cosine, found 'linear'"),
        ("optimizer.warmup_steps", 800, r"optimizer.warmup_steps: expected less than steps \(800\), found 800"),
        ("cross_entropy_steps", 800, r"cross_entropy_steps: expected less than steps \(800\), found 800"),
        ("cross_entropy_steps", -1, "cross_entropy_steps: expected a number that is zero or more, found -1"),
        ("draft_vocabulary", "-1", "draft_vocabulary: expected a number of tokens, 0 or \"auto\", found '-1'"),
        ("draft_vocabulary", "8k", "draft_vocabulary: expected a number of tokens, 0 or \"auto\", found '8k'"),
        ("optimizer.learning_rate", float("nan"), "optimizer.learning_rate: expected a number"),
        ("mesh.fsdp", 0, "mesh.fsdp: expected a number that is more than zero, found 0"),
        ("mesh.fsdp", -2, "mesh.fsdp: expected a number that is more than zero, found -2"),
        ("data.files", "", "data.files: empty"),
        ("data.held_out", 0.6, "data.held_out: expected a share of at most 0.5, found 0.6"),
        ("data.template", "vicuna", r'data\.template: expected vicuna_v1.1 or llama-2 or llama-3 or "", found'),
        ("target", " ", r"target: empty; give one with --config\.target=\.\.\."),
        ("output", "az://bucket/run", "output: expected a folder, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER, found az:"),
        ("data.cache", "az://bucket/cache", "data.cache: expected a folder, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER"),
    ],
)
def test_values_out_of_range_are_named(name, value, expected):
    with pytest.raises(InputError, match=expected):
        configured({name: value})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"steps": "many"}, "steps: expected a value of type int, found 'many'"),
        ({"draft_vocabulary": True}, "draft_vocabulary: expected a value of type str, found True"),
        ({"steps": True}, "steps: expected a value of type int, found True"),
        ({"steps": 10.0}, "steps: expected a value of type int, found 10.0"),
        ({"optimizer": {"learning_rate": "1e-3"}}, "optimizer.learning_rate: expected a value of type float"),
        ({"optimizer": "adam"}, "config: optimizer: expected several settings, found 'adam'"),
        ({"data": {"files": 3}}, "data.files: expected a value of type str, found 3"),
        ({"data": {"files": "a.txt", "template": ["llama-2"]}}, "data.template: expected vicuna_v1.1"),
    ],
)
def test_values_of_a_wrong_type_are_named(settings, expected):
    with pytest.raises(InputError, match=expected):
        config_dict(**{"target": "folder", "output": "run", "data": {"files": "a.txt"}} | settings)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("momentum", "expected one of target, output, data.files, "),
        ("learning_rate", r"did you mean optimizer\.learning_rate\?$"),
        ("optimizer.learning_rat", r"did you mean optimizer\.learning_rate\?$"),
        ("optimizer.clip", r"did you mean optimizer\.clip_norm\?$"),
        ("optimizer.files", r"did you mean data\.files\?$"),
        ("data.template_name", r"did you mean data\.template\?$"),
    ],
)
def test_an_unknown_setting_is_named_with_the_nearest_known_one(name, nearest):
    config = demo_config()
    *section, last = name.split(".")
    (config[section[0]] if section else config)[last] = 0.9
    with pytest.raises(InputError, match=f"^config: {re.escape(name)} is not a setting; {nearest}"):
        check_config(config)


def test_a_setting_left_out_has_its_default_and_one_without_a_default_is_missing():
    config = demo_config()
    del config.optimizer.clip_norm
    del config.mesh
    assert check_config(config).optimizer.clip_norm == OptimizerConfig().clip_norm
    assert check_config(config).mesh == MeshConfig()
    del config.data.files
    with pytest.raises(InputError, match=r"data\.files is missing"):
        check_config(config)
    with pytest.raises(InputError, match="target is missing"):
        config_dict(output="run")


def test_choices_are_those_that_the_code_has():
    def choices(kind, name):
        return set(get_args(get_type_hints(kind)[name]))

    assert choices(TrainConfig, "loss") == set(LOSSES)
    assert choices(DataConfig, "template") == {*chat.NAMED, ""}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_every_config_file_is_right(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = check_config(module.get_config())
    assert config.output == f"runs/{path.stem}"
    assert f"--config=configs/{path.name}" in module.__doc__


def test_a_run_that_was_started_before_there_was_a_train_config_goes_on():
    config = configured({"adapter.kind": "kangaroo"})  # the default then
    assert flat(config).keys() > EARLIER.keys()
    check_same_run(config, EARLIER, pathlib.Path("run"))
    with pytest.raises(InputError, match=r"expected optimizer\.clip_norm 0\.5, found 1\.0"):
        check_same_run(config, EARLIER | {"optimizer.clip_norm": 1.0}, pathlib.Path("run"))
    with pytest.raises(InputError, match=r"expected adapter\.kind memory, found kangaroo"):
        check_same_run(check_config(demo_config()), EARLIER, pathlib.Path("run"))
    with pytest.raises(InputError, match="expected cross_entropy_steps 5, found 0"):
        later = {"adapter.kind": "kangaroo", "cross_entropy_steps": 5}
        check_same_run(configured(later), EARLIER, pathlib.Path("run"))


def test_a_draft_vocabulary_may_be_written_as_a_number():
    made = config_dict(target="folder", output="run", data={"files": "a.txt"}, draft_vocabulary=8192)
    assert check_config(made) == dataclasses.replace(check_config(made), draft_vocabulary="8192")
