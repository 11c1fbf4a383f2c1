"""Targets in buckets, in emulators: what is loaded, and how many bytes of it are read."""

import json
import shutil
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from kangaroo_jax.buckets import Bucket, Copy
from kangaroo_jax.checkpoint.mapping import parameter_rule
from kangaroo_jax.checkpoint.remote_safetensors import RemoteSafetensors
from kangaroo_jax.checkpoint.target import load_target
from kangaroo_jax.checkpoint.weights import open_bucket_weights
from kangaroo_jax.errors import InputError
from kangaroo_jax.model import sharding
from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.naming import parameter_paths
from kangaroo_jax.model.target import TargetModel
from tests.emulators import Fault


@pytest.mark.long
def test_a_target_is_the_same_from_a_bucket_and_a_disk(service, target, target_folder, tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(target_folder, folder)
    (folder / "modeling.py").write_text("raise SystemExit('never run')")
    service.put_folder(folder, "targets/tiny")
    before = len(service.requests)
    loaded = load_target(service.location("targets/tiny"), "float32")
    assert loaded.fingerprint == target.fingerprint
    assert loaded.eos_token_ids == target.eos_token_ids
    assert loaded.tokenizer("def f():")["input_ids"] == target.tokenizer("def f():")["input_ids"]
    for found, expected in zip(jax.tree.leaves(loaded.model), jax.tree.leaves(target.model), strict=True):
        assert np.array_equal(found, expected)
    assert not any("modeling.py" in line for line in service.requests[before:])


def test_what_cannot_be_loaded_is_named(gcs, target_folder, tmp_path):
    config, weights = (target_folder / name for name in ("config.json", "model.safetensors"))
    for name, content in {
        "none/other": b"x",
        "torch/config.json": config.read_bytes(),
        "torch/pytorch_model.bin": b"x",
        "gguf/model.gguf": b"GGUF",
        "bad/config.json": b"{",
        "cut/config.json": config.read_bytes(),
        "cut/model.safetensors": weights.read_bytes()[:-1000],
    }.items():
        gcs.put(f"wrong/{name}", content)
    at = gcs.location("wrong")
    for name, expected in {
        "nothing": f"{at}/nothing: no such folder in the bucket; expected a target in Hugging Face format",
        "none": f"{at}/none/config.json: no such file; a folder in Hugging Face format has one",
        "torch": f"{at}/torch: no weights; expected model.safetensors, or model.safetensors.index.json and shards (Py",
        "gguf": f"{at}/gguf: GGUF files are read from a disk; copy it there",
        "bad": f"{at}/bad/config.json: not valid JSON",
        "cut": f"{at}/cut/model.safetensors: truncated or not a safetensors file (tensor ",
    }.items():
        with pytest.raises(InputError) as error:
            load_target(f"{at}/{name}")
        assert str(error.value).startswith(expected)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (b"123", "its header is cut"),
        (b"\xff" * 8, "its header is cut"),
        (b"\x02" + bytes(7) + b"[]", "its header is no object"),
        (b"\x02" + bytes(7) + b"{x", "Expecting property name"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "tensor a is not where its header says"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "of tensor a its header says"),
        ({"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}, "tensor a is not where"),
        ({"a": []}, "of tensor a its header says"),
    ],
)
def test_damaged_headers_are_named(gcs, header, expected):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    content = text if isinstance(header, bytes) else len(text).to_bytes(8, "little") + text + bytes(8)
    gcs.put("header/x", content)
    with pytest.raises(
        InputError, match=f"^{gcs.location('header')}/x: truncated or not .*{expected}.*; upload it again"
    ):
        RemoteSafetensors(Bucket(gcs.location("header")), "x", len(content))


@pytest.mark.long
def test_a_host_reads_its_share_of_a_sharded_checkpoint_and_little_else(service, tmp_path):
    """Llama-7B's layer at a quarter of its width, in four files: the first of eight devices along fsdp."""
    config = ModelConfig(
        model_type="llama",
        vocab_size=8000,
        hidden_size=1024,
        intermediate_size=2752,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=128,
    )
    abstract = nnx.eval_shape(lambda: TargetModel(config, rngs=nnx.Rngs(0)))
    shapes = dict(zip(parameter_paths(abstract), (x.shape for x in jax.tree.leaves(abstract)), strict=True))
    rng = np.random.default_rng(0)
    tensors = {}
    for path, shape in shapes.items():
        for name, size in zip(*(getattr(parameter_rule(path, shape), x) for x in ("names", "shapes")), strict=True):
            bits = rng.integers(0, 2**16, size, np.uint16)
            tensors[name] = bits.view(ml_dtypes.bfloat16)
    weight_map = {name: f"model-0000{i % 4 + 1}-of-00004.safetensors" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        part = {name: x for name, x in tensors.items() if weight_map[name] == shard}
        service.put(f"sharded/{shard}", safetensors.numpy.save(part))
    service.put("sharded/model.safetensors.index.json", json.dumps({"weight_map": weight_map}).encode())

    mesh = SimpleNamespace(shape={"data": 1, "fsdp": 8, "model": 1})
    wanted, service.received, requests = 0, 0, len(service.requests)
    service.faults += [Fault("GET .*model-00002", times=1, cut=True), Fault("GET .*model-00003", times=1, status=503)]
    with Copy(Bucket(service.location("sharded"))) as copy:
        copy.fetch_all(lambda name: name.endswith(".json"))
        weights = open_bucket_weights(copy)
        for path, shape in shapes.items():
            spec = sharding.partition(path, shape, mesh)
            index = tuple(
                slice(0, n // 8) if axis == "fsdp" else slice(0, n)
                for n, axis in zip(shape, (*spec, *[None] * len(shape))[: len(shape)], strict=True)
            )
            rule = parameter_rule(path, shape)
            for name, pieces in zip(rule.names, rule.locate(index), strict=True):
                found = weights.read(name, pieces)
                expected = np.concatenate([tensors[name][piece] for piece in pieces])
                assert found.tobytes() == expected.tobytes(), name
                wanted += found.nbytes
    total = sum(x.nbytes for x in tensors.values())
    assert wanted < 0.13 * total
    assert wanted <= service.received <= 1.03 * wanted, (service.received, wanted, total)
    assert [fault.met for fault in service.faults] == [1, 1]
    assert len(service.requests) - requests < 40 * len(tensors)
