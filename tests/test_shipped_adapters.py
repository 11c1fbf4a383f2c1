"""Adapters that come with the package: which one is found for a target, and what a user is told of it."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import pytest

from kangaroo_jax import adapters, demo, load_adapter, load_target
from kangaroo_jax.checkpoint.adapter import read_metadata, save_adapter
from kangaroo_jax.cli.models import load_adapter_of, load_target_of
from kangaroo_jax.errors import InputError


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The demo's target, and the folder of a second adapter of it, as it would lie in the package."""
    target = load_target(demo.MODEL, "float32")
    folder = tmp_path_factory.mktemp("adapters") / "another"
    save_adapter(folder, load_adapter(demo.ADAPTER, target).model, exit_layer=2, target=target)
    return target, folder


def test_each_adapter_of_the_package_is_a_folder_that_is_found_by_its_target():
    target = load_target(demo.MODEL, "float32")
    assert adapters.find(target) == demo.ADAPTER
    assert len(adapters.folders()) > 1
    for folder in adapters.folders():
        recorded = read_metadata(folder)["target"]["fingerprint"]
        assert adapters.find(dataclasses.replace(target, fingerprint=recorded, other_fingerprints=())) == folder


def test_the_very_target_comes_before_one_of_the_same_shapes(shipped):
    target, folder = shipped
    tuned = dataclasses.replace(target, fingerprint="v2:0", other_fingerprints=())
    assert adapters.find(tuned, [demo.ADAPTER, folder]) == folder  # the demo's is from before constants were recorded
    assert adapters.find(tuned, [demo.ADAPTER]) is None
    longer = folder.with_name("longer")
    shutil.copytree(folder, longer)
    file = longer / "metadata" / "metadata"
    metadata = json.loads(file.read_text())
    metadata["target"]["fingerprint"] = "v2:1"
    file.write_text(json.dumps(metadata))
    assert adapters.find(target, [longer, folder]) == folder
    assert adapters.find(tuned, [longer, folder]) == longer


def test_what_is_found_is_said_in_one_line(shipped, monkeypatch, capsys):
    target, folder = shipped
    assert load_adapter_of(target, None).name == str(demo.ADAPTER)
    assert capsys.readouterr().err == ""  # the default of a command without flags
    monkeypatch.setattr(adapters, "folders", lambda: [folder])
    assert load_adapter_of(target, None).exit_layer == 2
    assert capsys.readouterr().err == "note: adapter another, which comes with the package\n"
    tuned = dataclasses.replace(target, name="tuned", fingerprint="v2:0", other_fingerprints=())
    load_adapter_of(tuned, str(folder))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"note: adapter {folder} was trained for {demo.MODEL}, which has the same shapes and other weights" in said
    monkeypatch.setattr(adapters, "folders", list)
    with pytest.raises(InputError, match=r"--adapter is missing, and none comes with the package for tuned; train one"):
        load_adapter_of(tuned, None)


def test_the_demo_is_in_float32_on_accelerators_too(monkeypatch, small_target_folder):
    monkeypatch.setattr("kangaroo_jax.checkpoint.target.default_dtype", lambda mesh=None: "bfloat16")
    assert load_target_of(None, None).model.dtype == jnp.float32
    assert load_target_of(str(demo.MODEL), None).model.dtype == jnp.float32
    assert load_target_of(None, "bfloat16").model.dtype == jnp.bfloat16
    assert load_target_of(str(small_target_folder), None).model.dtype == jnp.bfloat16
