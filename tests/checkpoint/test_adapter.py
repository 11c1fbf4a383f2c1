"""Adapter checkpoints: what is loaded must equal, bit for bit, what was saved; what does not fit must be named.

What a checkpoint contains is read with Orbax itself.
"""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from kangaroo_jax.checkpoint import adapter as adapter_module
from kangaroo_jax.checkpoint.adapter import (
    item_handlers,
    load_adapter,
    named_leaves,
    save_adapter,
    write_draft_vocabulary,
)
from kangaroo_jax.checkpoint.target import Target, load_target
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.config import ModelConfig, RopeScaling
from kangaroo_jax.model.drafts.kangaroo import Adapter, DraftVocabulary
from kangaroo_jax.model.drafts.memory import MemoryAdapter
from kangaroo_jax.model.target import TargetModel

GOLDEN = pathlib.Path(__file__).parents[1] / "fixtures" / "golden"
CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=61,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=32,
)


def make_target(config: ModelConfig = CONFIG, fingerprint: str = "0123456789abcdef", dtype=jnp.float32) -> Target:
    model = nnx.eval_shape(lambda: TargetModel(config, rngs=nnx.Rngs(0), dtype=dtype))  # its weights are not needed
    return Target(model=model, tokenizer=None, name="some/target", fingerprint=fingerprint, eos_token_ids=())


@pytest.fixture(scope="module")
def target():
    return make_target()


@pytest.fixture(scope="module")
def adapter():
    return Adapter(CONFIG, rngs=nnx.Rngs(7))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, adapter, target):
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    save_adapter(folder, adapter, exit_layer=2, target=target, training={"steps": 5})
    return folder


def assert_same(found: Adapter, expected: Adapter, dtype: str = "float32") -> None:
    expected = named_leaves(expected)
    found = named_leaves(found)
    assert found.keys() == expected.keys()
    for path, x in expected.items():
        assert found[path].dtype == dtype
        assert np.array_equal(found[path], x.astype(dtype)), path


def test_loaded_equals_saved(saved, adapter, target):
    loaded = load_adapter(saved, target)
    assert loaded.exit_layer == 2
    assert loaded.name == str(saved)
    assert_same(loaded.model, adapter)


def test_loaded_in_the_targets_dtype(saved, adapter):
    assert_same(load_adapter(saved, make_target(dtype=jnp.bfloat16)).model, adapter, "bfloat16")


def test_biases_are_kept(tmp_path):
    config = dataclasses.replace(CONFIG, qkv_bias=True, o_bias=True)
    adapter = jax.tree.map(lambda x: x + 0.25, Adapter(config, rngs=nnx.Rngs(1)))
    target = make_target(config)
    save_adapter(tmp_path / "adapter", adapter, exit_layer=1, target=target)
    assert_same(load_adapter(tmp_path / "adapter", target).model, adapter)


@pytest.mark.parametrize("sizes", [{"num_layers": 2}, {"mlp_size": 24}], ids=["two layers", "an MLP"])
def test_an_adapter_of_another_shape_than_the_papers_is_read_as_one(tmp_path, target, sizes):
    adapter = Adapter(CONFIG, rngs=nnx.Rngs(2), **sizes)
    save_adapter(tmp_path / "adapter", adapter, exit_layer=2, target=target)
    assert_same(load_adapter(tmp_path / "adapter", target).model, adapter)


@pytest.mark.parametrize("kind", [Adapter, MemoryAdapter], ids=["kangaroo", "memory"])
def test_a_draft_vocabulary_is_stored_by_its_tokens_alone(tmp_path, kind):
    model = TargetModel(CONFIG, rngs=nnx.Rngs(0))
    target = dataclasses.replace(make_target(), model=model)
    adapter = kind(CONFIG, rngs=nnx.Rngs(2))
    adapter.draft_vocabulary = DraftVocabulary(model, jnp.asarray([3, 5, 60]))
    folder = tmp_path / "adapter"
    save_adapter(folder, adapter, exit_layer=2, target=target)
    metadata = json.loads((folder / "metadata" / "metadata").read_text())
    own = named_leaves(kind(CONFIG, rngs=nnx.Rngs(2)))
    assert metadata["parameters"].keys() == {*own, "draft_vocabulary.token_ids"}
    assert metadata["kind"] == kind.kind
    loaded = load_adapter(folder, target).model
    assert type(loaded) is kind
    for path, x in own.items():
        assert np.array_equal(named_leaves(loaded)[path], x), path
    found = loaded.draft_vocabulary
    assert found.token_ids[...].tolist() == [3, 5, 60]
    np.testing.assert_array_equal(found.weight[...], model.lm_head[...][np.asarray([3, 5, 60])])
    # A file beside it comes first.
    write_draft_vocabulary(folder, [1, 2])
    assert load_adapter(folder, target).model.draft_vocabulary.token_ids[...].tolist() == [1, 2]


def test_a_draft_vocabulary_of_another_vocabulary_is_named(tmp_path):
    target = dataclasses.replace(make_target(), model=TargetModel(CONFIG, rngs=nnx.Rngs(0)))
    adapter = Adapter(CONFIG, rngs=nnx.Rngs(2))
    adapter.draft_vocabulary = DraftVocabulary(target.model, jnp.asarray([3, 5]))
    adapter.draft_vocabulary.token_ids[...] = jnp.asarray([3, 61])
    save_adapter(tmp_path / "adapter", adapter, exit_layer=2, target=target)
    message = one_line(tmp_path / "adapter", target)
    assert "parameter draft_vocabulary.token_ids: token id 61 is outside the vocabulary of 61" in message


def test_holds_the_adapter_and_its_metadata_alone(saved, adapter):
    assert {path.name for path in saved.iterdir() if path.is_dir()} == {"adapter", "metadata"}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**item_handlers())) as checkpointer:
        listed = checkpointer.metadata(saved).item_metadata["adapter"].tree
    assert {path: tuple(x.shape) for path, x in listed.items()} == {
        p: x.shape for p, x in named_leaves(adapter).items()
    }
    metadata = json.loads((saved / "metadata" / "metadata").read_text())
    assert metadata["exit_layer"] == 2
    assert metadata["target"]["fingerprint"] == "0123456789abcdef"
    assert metadata["target"]["num_hidden_layers"] == 4
    assert metadata["target"]["rope_theta"] == 10000.0
    assert metadata["training"] == {"steps": 5}
    size = sum(path.stat().st_size for path in saved.rglob("*"))
    assert size < 1.2 * sum(x.nbytes for x in jax.tree.leaves(adapter)) + 65536


def test_newest_finished_step_of_a_run(tmp_path, saved, adapter, target):
    other = jax.tree.map(lambda x: x + 1, adapter)
    shutil.copytree(saved, tmp_path / "9")
    save_adapter(tmp_path / "10", other, exit_layer=3, target=target)
    (tmp_path / "11.orbax-checkpoint-tmp" / "adapter").mkdir(parents=True)  # a save that was interrupted
    newest = load_adapter(tmp_path, target)
    assert newest.exit_layer == 3
    assert_same(newest.model, other)
    assert_same(load_adapter(tmp_path / "9", target).model, adapter)


def one_line(path, target) -> str:
    with pytest.raises(InputError) as error:
        load_adapter(path, target)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_missing_path_says_how_to_train_one(tmp_path, target):
    message = one_line(tmp_path / "missing", target)
    assert "no such adapter checkpoint" in message
    assert "python train.py --config=configs/demo.py --config.target=some/target" in message


def test_what_is_no_checkpoint_is_named(tmp_path, target):
    (tmp_path / "file").write_text("x")
    assert "expected a folder, found a file" in one_line(tmp_path / "file", target)
    assert "not an adapter checkpoint" in one_line(tmp_path, target)
    (tmp_path / "empty").mkdir()
    assert "found an empty folder" in one_line(tmp_path / "empty", target)


NEAR = "fedcba9876543210"  # the fingerprint of other weights


def test_an_adapter_of_a_target_with_other_weights_is_used_and_says_so(saved, adapter, target):
    near = load_adapter(saved, make_target(fingerprint=NEAR))
    assert near.other_target == "some/target"
    assert near.exit_layer == 2
    assert_same(near.model, adapter)
    assert load_adapter(saved, target).other_target is None


def test_numbers_that_a_file_format_rounds_to_float32_are_the_same(saved):
    eps = float(np.float32(CONFIG.rms_norm_eps))
    assert eps != CONFIG.rms_norm_eps
    assert load_adapter(saved, make_target(dataclasses.replace(CONFIG, rms_norm_eps=eps), NEAR)).other_target


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 5},
        {"vocab_size": 62},
        {"intermediate_size": 65},
        {"num_key_value_heads": 3},
        {"model_type": "olmo2"},
        {"rope_theta": 20000.0},
        {"rms_norm_eps": 1e-5},
        {"tie_word_embeddings": True},
        {"rope_scaling": RopeScaling("linear", 2.0)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_target_that_differs_in_more_than_weights_is_another(saved, change):
    message = one_line(saved, make_target(dataclasses.replace(CONFIG, **change), NEAR))
    for part in (
        "trained for another target",
        "expected some/target (fingerprint fedcba9876543210)",
        "(fingerprint 0123456789abcdef)",
    ):
        assert part in message


def test_an_adapter_from_before_constants_were_recorded_is_for_its_target_alone(tmp_path, saved, adapter, target):
    folder = tmp_path / "adapter"
    shutil.copytree(saved, folder)
    file = folder / "metadata" / "metadata"
    metadata = json.loads(file.read_text())
    del metadata["target"]["rope_theta"]
    file.write_text(json.dumps(metadata))
    assert_same(load_adapter(folder, target).model, adapter)
    message = one_line(folder, make_target(fingerprint=NEAR))
    for part in (
        "another target",
        "expected some/target (fingerprint fedcba9876543210)",
        "(fingerprint 0123456789abcdef)",
    ):
        assert part in message


def test_wrong_shapes_are_named(saved):
    message = one_line(saved, make_target(dataclasses.replace(CONFIG, num_key_value_heads=3)))
    assert "layers.0.self_attn.qkv_proj has the wrong shape; expected [48, 3, 4, 8], found [48, 2, 5, 8]" in message
    message = one_line(saved, make_target(dataclasses.replace(CONFIG, o_bias=True)))
    assert "layers.0.self_attn.o_bias is missing" in message


def test_exit_layer_must_fit_the_target(tmp_path, saved, adapter, target):
    message = one_line(saved, make_target(dataclasses.replace(CONFIG, num_hidden_layers=2)))
    assert "exit_layer: expected 1 to 1 (the target has 2 layers), found 2" in message
    for exit_layer in (0, 4):
        with pytest.raises(InputError, match=f"exit_layer: expected 1 to 3 .*, found {exit_layer}"):
            save_adapter(tmp_path / "adapter", adapter, exit_layer=exit_layer, target=target)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    "damaged",
    ["metadata/metadata", "adapter/_METADATA", "adapter/manifest.ocdbt", "adapter/d/*", "adapter/ocdbt.process_0/d/*"],
)
def test_truncated_files_are_named(tmp_path, saved, target, damaged):
    folder = tmp_path / "adapter"
    shutil.copytree(saved, folder)
    for path in folder.glob(damaged):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "damaged or not an adapter checkpoint" in one_line(folder, target)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_number_that_changed_on_disk_is_found(tmp_path, adapter, target, dtype, monkeypatch):
    """Orbax itself would not see it."""
    folder = tmp_path / "adapter"
    stored = jax.tree.map(lambda x: x.astype(dtype), adapter)
    save_adapter(folder, stored, exit_layer=2, target=target)
    load_adapter(folder, target)
    read = adapter_module.read_arrays

    def changed(*args):
        arrays = read(*args)
        array = arrays["layers.0.self_attn.o_proj"] = arrays["layers.0.self_attn.o_proj"].copy()
        array.view(np.uint8)[3, 5] ^= 16
        return arrays

    monkeypatch.setattr(adapter_module, "read_arrays", changed)
    assert "damaged (layers.0.self_attn.o_proj is not as it was written)" in one_line(folder, target)


def test_another_format_is_named(tmp_path, saved, target):
    folder = tmp_path / "adapter"
    shutil.copytree(saved, folder)
    file = folder / "metadata" / "metadata"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 2}))
    assert "expected format 'kangaroo_jax adapter' 1, found 'kangaroo_jax adapter' 2" in one_line(folder, target)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, ...) for name in ("exit_layer", "parameters", "target")),
        ("exit_layer", "2"),
        ("exit_layer", True),
        ("parameters", None),
        ("parameters", {"norm.weight": None}),
        ("target", None),
        ("target", {"name": "a"}),
        ("training", 5),
    ],
)
def test_metadata_that_was_edited_is_named(tmp_path, saved, target, name, value):
    folder = tmp_path / "adapter"
    shutil.copytree(saved, folder)
    file = folder / "metadata" / "metadata"
    metadata = json.loads(file.read_text())
    del metadata[name]
    file.write_text(json.dumps(metadata if value is ... else metadata | {name: value}))
    assert f"metadata: {name} is missing or of a wrong type" in one_line(folder, target)


@pytest.mark.parametrize("shape", [(10**15,), (10**30,), (100,)])
def test_a_draft_vocabulary_that_is_shorter_than_it_says_is_named(tmp_path, saved, target, shape):
    folder = tmp_path / "adapter"
    shutil.copytree(saved, folder)
    with open(folder / "draft_vocabulary.npy", "wb") as file:
        header = {"descr": "<i4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(16))
    assert "draft_vocabulary.npy: not a NumPy array" in one_line(folder, target)


def test_the_kind_of_draft_model_is_recorded_and_another_is_named(tmp_path, saved, target, adapter):
    folder = tmp_path / "adapter"
    shutil.copytree(saved, folder)
    file = folder / "metadata" / "metadata"
    metadata = json.loads(file.read_text())
    assert metadata.pop("kind") == "kangaroo"
    file.write_text(json.dumps(metadata))  # as before kinds were recorded
    assert_same(load_adapter(folder, target).model, adapter)
    assert metadata["written_by"].startswith("kangaroo_jax ")
    file.write_text(json.dumps(metadata | {"kind": "remembering", "written_by": "kangaroo_jax 7.0"}))
    message = one_line(folder, target)
    assert "draft model of kind 'remembering', written by kangaroo_jax 7.0, is not supported by kangaroo" in message
    file.write_text(json.dumps(metadata | {"kind": ["kangaroo"]}))
    assert "draft model of kind ['kangaroo']" in one_line(folder, target)


def test_saving_leaves_what_is_there_alone(tmp_path, adapter, target):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        save_adapter(tmp_path / "adapter", adapter, exit_layer=2, target=target)
    assert (tmp_path / "adapter" / "notes.txt").read_text() == "mine"


def test_the_authors_folder_is_recognised():
    pytest.importorskip("torch", reason="reading PyTorch weights needs torch")
    loaded = load_adapter(GOLDEN / "tiny-gqa-adapter", load_target(str(GOLDEN / "tiny-gqa"), "float32"))
    assert loaded.exit_layer is None
