"""Training runs. What a checkpoint may hold is read from the adapter's own parameter list; what training is for is
measured as held-out expected acceptance.
"""

import functools
import json
import math
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kangaroo_jax import generate, generate_plain, load_target
from kangaroo_jax.checkpoint.adapter import (
    abstract_adapter,
    adapter_from_parameters,
    load_adapter,
    named_leaves,
    read_metadata,
)
from kangaroo_jax.config import AdapterConfig, DataConfig, OptimizerConfig, TrainConfig
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.drafts.kangaroo import adapter_apply
from kangaroo_jax.train.loop import train
from kangaroo_jax.train.step import initial_parameters, make_optimizer
from tests.reports import Said

from .runs import checkpoint, configured

ROOT = pathlib.Path(__file__).parents[2]


def test_training_improves_held_out_acceptance(run):
    _, result, said = run
    before = float(re.search(r"step 0: .*expected acceptance ([\d.]+)", said).group(1))
    assert result["expected_acceptance"] > before + 0.02


@pytest.mark.long
def test_a_run_trains_for_the_weights_that_it_names(settings, target_folder, tmp_path):
    short = settings | {"steps": 2, "save_every": 2, "optimizer.warmup_steps": 1}
    train(configured(short, output=str(tmp_path / "run"), weights="int8"))
    assert read_metadata(tmp_path / "run" / "2")["target"]["fingerprint"].endswith(":int8")
    assert load_adapter(tmp_path / "run", load_target(target_folder, "float32", weights="int8")).other_target is None
    assert "int8" in load_adapter(tmp_path / "run", load_target(target_folder, "float32")).other_target
    with pytest.raises(InputError, match="another target"):  # not gone on with for others
        train(configured(short | {"steps": 4}, output=str(tmp_path / "run")))


def test_checkpoint_holds_the_adapter_and_its_optimizer_alone(run, target):
    output, _, _ = run
    adapter = abstract_adapter(target.config, jnp.float32, AdapterConfig("kangaroo"))
    shapes = {path: x.shape for path, x in named_leaves(adapter).items()}
    for step in ("10", "20"):
        assert {x.name for x in (output / step).iterdir() if x.is_dir()} == {
            "adapter",
            "metadata",
            "optimizer",
            "position",
            "metrics",
        }
        items = checkpoint(output / step)
        assert {path: x.shape for path, x in items["adapter"].items()} == shapes
        for path, x in items["optimizer"].items():
            owner = [name for name in shapes if path.endswith(f".{name}")]
            assert x.shape == (shapes[owner[0]] if owner else ()), path
        assert items["position"]["step"] == int(step)


def test_load_adapter_reads_a_run_and_a_step_of_it(run, target):
    output, result, _ = run
    newest, step = load_adapter(output, target), load_adapter(output / "20", target)
    assert newest.exit_layer == step.exit_layer == 3
    stored = checkpoint(output / "20")
    for adapter in (newest, step):
        for path, x in named_leaves(adapter.model).items():
            assert np.array_equal(x, stored["adapter"][path])
    assert stored["metadata"]["training"]["held_out"] == result
    older = load_adapter(output / "10", target)
    assert not np.array_equal(older.model.norm.weight[...], newest.model.norm.weight[...])


def test_run_folder_has_tensorboard_events(run):
    events = b"".join(path.read_bytes() for path in run[0].glob("events.out.tfevents.*"))
    for name in (b"train/loss", b"train/tokens_per_second", b"held_out/expected_acceptance"):
        assert name in events


def test_a_complete_run_says_so_and_changes_nothing(run, settings):
    output, result, _ = run
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    report = Said()
    assert train(configured(settings, output=str(output)), report=report) == result
    assert "complete, 20 steps" in report.text
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("exit_layer", 2, "expected exit_layer 2, found 3"),
        ("optimizer.learning_rate", 1e-4, "expected optimizer.learning_rate 0.0001, found 0.003"),
        ("steps", 30, "expected steps 30, found 20"),  # the cosine was laid out for 20
        ("batch_size", 2, "expected batch_size 2, found 4"),
    ],
)
def test_other_settings_do_not_go_on_with_a_run(run, settings, name, value, expected):
    with pytest.raises(InputError, match=expected):
        train(configured(settings, output=str(run[0]), **{name: value}))


def test_other_text_or_another_target_does_not_go_on_with_a_run(run, settings, tmp_path):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run[0] / "10", unfinished / "10")
    files = settings["data.evaluation_files"]
    with pytest.raises(InputError, match="trained on other data"):
        train(configured(settings, output=str(unfinished), **{"data.files": files}))
    other = str(ROOT / "tests" / "fixtures" / "golden" / "tiny-mha")
    with pytest.raises(InputError, match="trained for another target"):
        train(configured(settings, output=str(unfinished), target=other))


def test_conversations_are_trained_on_in_their_template(settings, small_target_folder, tmp_path):
    turns = [("human", "why?"), ("gpt", "because"), ("human", "and?"), ("gpt", "so " * 40)]
    record = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    (tmp_path / "chats.json").write_text(json.dumps([record] * 40))
    output = tmp_path / "run"
    overrides = {
        "target": str(small_target_folder),
        "exit_layer": 1,
        "output": str(output),
        "steps": 2,
        "save_every": 2,
        "optimizer.warmup_steps": 1,
        "optimizer.schedule": "constant",
        "data.files": str(tmp_path / "chats.json"),
        "data.evaluation_files": "",
        "data.held_out": 0.1,
    }
    with pytest.raises(InputError, match=r"chats\.json:1 \(item 0\): a conversation, but .*; set data\.template"):
        train(configured(settings | overrides))
    assert not output.exists()
    result = train(configured(settings | overrides, **{"data.template": "vicuna_v1.1"}))
    assert 0 < result["expected_acceptance"] < 1
    assert checkpoint(output / "2")["position"]["step"] == 2
    with pytest.raises(InputError, match="trained on other data"):
        train(configured(settings | overrides, **{"data.template": "llama-3", "steps": 4}))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("exit_layer", 8, r"exit_layer: expected 1 to 7 \(the target has 8 layers\), found 8"),
        ("adapter.num_layers", 6, "adapter.num_layers: expected at most 5, the target's layers from exit_layer 3 on"),
        ("sequence_length", 4096, "sequence_length: expected at most 512, the context of"),
        ("data.files", "/missing/*.txt", r"/missing/\*.txt: no such file"),
        ("target", "/missing", "/missing: no such folder"),
    ],
)
def test_wrong_settings_are_named_and_leave_nothing_behind(settings, tmp_path, name, value, expected):
    output = tmp_path / "run"
    with pytest.raises(InputError, match=expected):
        train(configured(settings, **{"output": str(output), name: value}))
    assert not output.exists()


def test_starting_parameters_are_copies_of_the_targets(target):
    shape = AdapterConfig("kangaroo")
    parameters = initial_parameters(target.model, 3, "layer", 0, shape)
    assert parameters.keys() == named_leaves(abstract_adapter(target.config, jnp.float32, shape)).keys()
    layer = target.model.layers[3]
    assert np.array_equal(parameters["layers.0.self_attn.qkv_proj"], layer.self_attn.qkv_proj[...])
    assert np.array_equal(parameters["norm.weight"], target.model.norm.weight[...])
    for array in parameters.values():
        array.delete()  # what donating them does
    assert np.isfinite(np.asarray(target.model.norm.weight[...])).all()


def test_a_zero_output_starts_as_the_exit_layer_itself_and_random_parameters_are_none_of_the_targets(target):
    hidden = jax.random.normal(jax.random.key(0), (1, 5, target.config.hidden_size))
    positions = jnp.arange(5)[None]

    # The target is an argument, not a constant that is compiled into the program.
    @functools.partial(jax.jit, static_argnums=0)
    def compiled(initialization, seed, model):
        parameters = initial_parameters(model, 3, initialization, seed, AdapterConfig("kangaroo"))
        return parameters, adapter_apply(adapter_from_parameters(target.config, parameters), hidden, positions)[0]

    def adapted(initialization, seed=0):
        return compiled(initialization, seed, target.model)

    parameters, output = adapted("zero_output")
    np.testing.assert_array_equal(output, target.model.norm(hidden))
    qkv = parameters["layers.0.self_attn.qkv_proj"]  # random: a zero there would never be trained away
    assert float(jnp.std(qkv)) == pytest.approx(0.02, rel=0.05)
    parameters, output = adapted("random")
    assert float(jnp.std(parameters["layers.0.self_attn.o_proj"])) == pytest.approx(0.02, rel=0.05)
    assert np.array_equal(parameters["norm.weight"], np.ones(target.config.hidden_size))
    assert not np.array_equal(output, adapted("random", seed=1)[1])


def test_each_layer_of_an_adapter_starts_from_a_layer_of_the_target(target):
    shape = AdapterConfig("kangaroo", num_layers=2)
    parameters = initial_parameters(target.model, 3, "layer", 0, shape)
    assert parameters.keys() == named_leaves(abstract_adapter(target.config, jnp.float32, shape)).keys()
    for i in range(2):
        expected = target.model.layers[3 + i].self_attn.qkv_proj[...]
        assert np.array_equal(parameters[f"layers.{i}.self_attn.qkv_proj"], expected)
    zero = initial_parameters(target.model, 3, "zero_output", 0, shape)
    assert not zero["layers.0.self_attn.o_proj"].any()
    assert not zero["layers.1.self_attn.o_proj"].any()


def test_an_mlp_adds_nothing_at_first(target):
    hidden = jax.random.normal(jax.random.key(0), (1, 5, target.config.hidden_size))

    def adapted(shape):
        parameters = initial_parameters(target.model, 3, "layer", 0, shape)
        return adapter_apply(adapter_from_parameters(target.config, parameters), hidden, jnp.arange(5)[None])[0]

    assert np.array_equal(adapted(AdapterConfig("kangaroo", mlp_size=24)), adapted(AdapterConfig("kangaroo")))


@pytest.mark.long
def test_an_adapter_of_two_layers_and_an_mlp_is_trained_and_decoded_with(settings, target, tmp_path):
    output = tmp_path / "run"
    short = {"output": str(output), "steps": 4, "save_every": 2, "adapter.num_layers": 2, "adapter.mlp_size": 24}
    train(configured(settings, **short))
    shutil.rmtree(output / "4")
    train(configured(settings, **short))
    start = initial_parameters(target.model, 3, "layer", 0, AdapterConfig("kangaroo", num_layers=2, mlp_size=24))
    adapter = load_adapter(output / "4", target)
    for path, x in named_leaves(adapter.model).items():
        assert not np.array_equal(x, start[path]), path
    out = generate(target, adapter, ["def f("], 16)
    assert out.tokens == generate_plain(target, ["def f("], 16).tokens
    for name, value, found in (("num_layers", 1, 2), ("mlp_size", 16, 24)):
        with pytest.raises(InputError, match=rf"expected adapter\.{name} {value}, found {found}"):
            train(configured(settings, **short | {f"adapter.{name}": value}))


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 4, [0, 0.25, 0.5, 0.75, 1, 1]),
        ("constant", 0, [1, 1, 1, 1, 1, 1]),
        ("cosine", 4, [0, 0.25, 0.5, 0.75, 1, (1 + math.cos(math.pi / 6)) / 2]),
        ("cosine", 0, [(1 + math.cos(math.pi * step / 10)) / 2 for step in range(6)]),
    ],
)
def test_optimizer_follows_the_schedule(schedule, warmup, expected):
    optimizer = make_optimizer(
        TrainConfig(
            target="none",
            output="none",
            data=DataConfig("none"),
            steps=10,
            optimizer=OptimizerConfig(learning_rate=1.0, warmup_steps=warmup, schedule=schedule, weight_decay=0.5),
        )
    )
    parameters = {"norm": jnp.ones((2,)), "matrix": jnp.ones((2, 2))}
    state, rates, update = optimizer.init(parameters), [], jax.jit(optimizer.update)
    for _ in range(6):
        # Zero gradients leave the weight decay alone: rate * 0.5 on matrices, nothing on norms.
        updates, state = update(jax.tree.map(jnp.zeros_like, parameters), state, parameters)
        rates.append(float(-updates["matrix"][0, 0]) * 2)
        assert not updates["norm"].any()
    assert rates == pytest.approx(expected, abs=1e-6)
