"""The table of partitions, and models split over 8 devices of one process against the same on one device."""

import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from kangaroo_jax.checkpoint.adapter import named_leaves
from kangaroo_jax.checkpoint.target import save_target
from kangaroo_jax.config import AdapterConfig
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.drafts.kinds import abstract_adapter
from kangaroo_jax.model.sharding import check_batch_size, make_mesh, partition, undivided
from kangaroo_jax.model.target import TargetModel
from tests.tokens import byte_tokenizer

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=264,
    hidden_size=32,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
    max_position_embeddings=128,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
)


def mesh_of(data: int, fsdp: int, model: int) -> types.SimpleNamespace:
    """As much of a mesh as the table reads."""
    return types.SimpleNamespace(shape={"data": data, "fsdp": fsdp, "model": model}, size=data * fsdp * model)


def test_every_parameter_and_its_optimizer_state_has_a_partition_and_every_matrix_is_split():
    target = named_leaves(nnx.eval_shape(lambda: TargetModel(CONFIG, rngs=nnx.Rngs(0))))
    adapter = named_leaves(abstract_adapter(CONFIG, jnp.float32, AdapterConfig("kangaroo"))) | named_leaves(
        abstract_adapter(CONFIG, jnp.float32, AdapterConfig("memory", mlp_size=16))
    )
    state = named_leaves(jax.eval_shape(optax.adamw(1e-3).init, dict(adapter.items())))
    assert len(state) > 2 * len(adapter)
    mesh = mesh_of(1, 2, 2)
    for path, x in (target | adapter | state).items():
        spec = partition(path, x.shape, mesh)
        axes = [axis for names in spec for axis in ((names,) if isinstance(names, str) else names or ())]
        assert len(axes) == len(set(axes)), path
        if x.ndim > 1 and "bias" not in path:
            assert sorted(axes) == ["fsdp", "model"], path
    with pytest.raises(ValueError, match=r"no partition is known for layers\.0\.router"):
        partition("layers.0.router", (4, 4), mesh)


def test_axes_that_do_not_divide_leave_a_dimension_whole_and_say_so():
    assert partition("layers.0.self_attn.qkv_proj", (32, 2, 4, 6), mesh_of(1, 4, 4)) == P(None, None, None, None)
    assert partition("layers.0.self_attn.qkv_proj", (32, 4, 4, 6), mesh_of(1, 2, 4)) == P(None, "model", None, "fsdp")
    assert partition("embed_tokens", (32001, 32), mesh_of(1, 2, 2)) == P(None, None)
    assert partition("embed_tokens", (6, 32), mesh_of(1, 2, 2)) == P("model", None)
    shapes = {"a.qkv_proj": np.zeros((4, 2, 4, 8)), "b.qkv_proj": np.zeros((4, 2, 4, 8)), "norm.weight": np.zeros(4)}
    notes = undivided(shapes, mesh_of(1, 2, 4))
    assert len(notes) == 1
    assert notes[0].startswith("mesh.model 4 divides no dimension of qkv_proj [4, 2, 4, 8]")
    assert undivided(shapes, mesh_of(4, 2, 2)) == []


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 3, -1), "expected sizes whose product is a divisor of 8, the number of devices; found 3"),
        ((1, 2, 2), "expected sizes whose product is exactly 8, the number of devices; found 4"),
        ((-1, -1, 1), "at most one -1"),
        ((0, -1, 1), "expected 1 or more each"),
    ],
)
def test_meshes_that_do_not_fit_the_devices_are_named(sizes, message):
    with pytest.raises(InputError, match=message):
        make_mesh(dict(zip(("data", "fsdp", "model"), sizes, strict=True)), [None] * 8)


def test_batches_that_do_not_divide_are_named():
    check_batch_size(8, mesh_of(2, 4, 3))
    with pytest.raises(InputError, match=r"batch_size: expected a multiple of 8, .* found 12"):
        check_batch_size(12, mesh_of(2, 4, 1))


_ON_8_DEVICES = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
import safetensors
from flax import nnx

from kangaroo_jax import DraftConfig, generate, load_target
from kangaroo_jax.checkpoint.adapter import TOKEN_IDS, TrainedAdapter
from kangaroo_jax.model.drafts.kangaroo import Adapter
from kangaroo_jax.model import sharding
from kangaroo_jax.train.loop import _Run
from kangaroo_jax.train.settings import check_config, make_mesh
from tests.train.runs import demo_config

counted = [0]
opened = safetensors.safe_open

class Counting:
    "A safetensors file that counts what is taken out of it."
    def __init__(self, *args, **kwargs): self.file = opened(*args, **kwargs)
    def __enter__(self): self.inner = self.file.__enter__(); return self
    def __exit__(self, *error): return self.file.__exit__(*error)
    def keys(self): return self.inner.keys()
    def get_slice(self, name): return CountingSlice(self.inner.get_slice(name))

class CountingSlice:
    def __init__(self, inner): self.inner = inner; self.get_shape = inner.get_shape; self.get_dtype = inner.get_dtype
    def __getitem__(self, index):
        part = self.inner[index]
        counted[0] += part.nbytes
        return part

safetensors.safe_open = Counting
folder, rows, reduced = sys.argv[1], [], []
rng = np.random.default_rng(0)
batches = [
    {
        "tokens": rng.integers(0, 256, (8, 24)).astype(np.int32),
        "loss_mask": (rng.random((8, 24)) < 0.7) * np.float32(1),
        "segment_ids": np.repeat(np.int32([[1, 2, 0]]), 8, axis=1).reshape(1, 24).repeat(8, axis=0),
        "positions": np.tile(np.arange(8, dtype=np.int32), (8, 3)),
    }
    for _ in range(4)
]
for count, sizes in [(1, (1, 1, 1)), (2, (1, 2, 1)), (4, (1, 1, 4)), (8, (2, 2, 2))]:
    config = demo_config()
    config.update_from_flattened_dict(
        dict(zip(("mesh.data", "mesh.fsdp", "mesh.model"), sizes))
        | {"target": folder, "exit_layer": 1, "batch_size": 8, "sequence_length": 24, "loss_chunk": 10}
        | {"optimizer.warmup_steps": 1, "optimizer.learning_rate": 3e-3}
    )
    settings = check_config(config)
    counted[0] = 0
    target = load_target(folder, "float32", make_mesh(settings, jax.devices()[:count]))
    run = _Run(settings, target)
    losses = []
    for batch in batches:
        arrays = run._put(batch)
        run.parameters, run.state, metrics = run._train_step(
            run.parameters, run.state, target.model, arrays, None, np.int32(0), "total_variation"
        )
        losses.append(float(metrics["loss"]))
    if count in (1, 8):
        run.draft_from(np.arange(5, 250, 4))
        drafted = run._drafted[TOKEN_IDS]
        metrics = run._evaluate_batch(run.parameters, target.model, arrays, drafted)
        reduced.append([np.ravel(metrics[name]).tolist() for name in ("loss", "expected_acceptance")])  # by depth
    held = [x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(target.model)]
    rows.append({"losses": losses, "read": counted[0], "said": target.bytes_read, "held": sum(held)})

prompts = [[5, 6, 7, 8], [9, 10, 11]]
meshes = (None, sharding.decoding_mesh(4, jax.devices()))
decoded, orders = [], []
for platform in ("none", "cpu"):  # the second time, in the memory layouts of TPUs
    sharding._ORDERS[platform] = sharding._ORDERS["tpu"]
    for mesh in meshes:
        target = load_target(folder, "float32", mesh)
        adapter = Adapter(target.config, rngs=nnx.Rngs(3))
        trained = TrainedAdapter(adapter, 1, "random", None)
        out = generate(target, trained, prompts, 40, draft=DraftConfig(None, 2, 0.0), eos_token_ids=[])
        decoded.append([out.tokens, out.accept_lengths])
        layer = target.model.layers[1]
        weights = layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj
        orders.append([weight[...].format.layout.major_to_minor for weight in weights])
print(json.dumps({"rows": rows, "reduced": reduced, "decoded": decoded, "orders": orders}))
"""

# A running batch on a mesh, more requests than slots, greedy and sampled; one ends with a stop string in its first
# tokens. Both ways of decoding; and where sequences are split over 4 devices, with look-ups.
_A_BATCH = """
import dataclasses, functools, json, sys
import jax, numpy as np
from flax import nnx

from kangaroo_jax import DraftConfig, Engine, EngineConfig, LookupConfig, Request, SamplingConfig
from kangaroo_jax import generate_many, generate_plain, load_target, program
from kangaroo_jax.checkpoint.adapter import TrainedAdapter
from kangaroo_jax.decode.rounds import run_rounds
from kangaroo_jax.model import sharding
from kangaroo_jax.model.drafts.kangaroo import Adapter

folder, draft, results = sys.argv[1], DraftConfig(None, 2, 0.0), []
meshes = json.loads(sys.argv[2])
requests = [Request("ab", 30), Request([5, 6, 7, 8], 40), Request([9, 10, 11], 25, SamplingConfig(1.0, seed=3))]
requests += [Request([i + 40] * (3 * i + 1), 12 + i) for i in range(3)]
for data, model in meshes:
    mesh = None if data * model == 1 else sharding.decoding_mesh(model, jax.devices(), data)
    target = load_target(folder, "float32", mesh)
    trained = TrainedAdapter(Adapter(target.config, rngs=nnx.Rngs(3)), 1, "random", None)
    if mesh is None:
        text = generate_plain(target, ["ab"], 30, eos_token_ids=[]).texts[0]
        stop = [next(c for c in text if c != chr(0xFFFD))]  # of a random model, not all text is characters
        requests[0] = dataclasses.replace(requests[0], stop=stop)
    decoded = []
    for adapter in (trained, None) if data * model == 1 or data == model else (trained,):
        answers = generate_many(target, adapter, requests, 4, draft=draft, eos_token_ids=[])
        decoded.append([[a.id, a.tokens, a.finish_reason] for a in sorted(answers, key=lambda a: a.id)])
    looked_up = []
    if [4, 1] in meshes and model == 1:
        lookups = dataclasses.replace(draft, lookup=LookupConfig(4, 1, 2))
        answers = generate_many(target, trained, requests, 4, draft=lookups, eos_token_ids=[])
        looked_up = [[a.id, a.tokens, a.lookup_lengths] for a in sorted(answers, key=lambda a: a.id)]
    engine = Engine(target, trained, EngineConfig(4), draft)
    for request in requests:
        engine.add(request)
    engine.step()
    state = engine._state
    parts = [cache.keys[0] for cache in (state.shallow, state.deep, state.draft.cache)] + [state.token]
    rounds = functools.partial(run_rounds, shape=engine.shapes.round, sampled=False, tokens=32)
    gathered = moved = 0
    if data * model > 1:
        inputs = (*engine._weights, state, np.ones(4, bool), np.float32(0), 0, 32)
        text = jax.jit(rounds).lower(*inputs).compile().as_text()
        found = {kind: x.num_bytes for kind, x in program.collectives(text).items()}
        gathered, moved = found.get("all-gather", 0), sum(found.values())
    shapes = [list(x.addressable_shards[0].data.shape) for x in parts]
    result = {"mesh": [data, model], "decoded": decoded, "shapes": shapes, "gathered": gathered, "moved": moved}
    results.append(result | {"looked_up": looked_up})
print(json.dumps(results))
"""


# In a batch of one, a prompt of several pieces, and a second turn behind it; on one device and on two.
_ALONE = """
import json, sys
import jax
from flax import nnx

from kangaroo_jax import DraftConfig, Engine, EngineConfig, Request, load_target
from kangaroo_jax.checkpoint.adapter import TrainedAdapter
from kangaroo_jax.engine.requests import Finished
from kangaroo_jax.model import sharding
from kangaroo_jax.model.drafts.kangaroo import Adapter

results = []
for mesh in (None, sharding.decoding_mesh(2, jax.devices())):
    target = load_target(sys.argv[1], "float32", mesh)
    trained = TrainedAdapter(Adapter(target.config, rngs=nnx.Rngs(3)), 1, "random", None)
    engine = Engine(target, trained, EngineConfig(1), DraftConfig(None, 2, 0.0))
    prompt, answers = [7 * i % 250 for i in range(700)], []
    for _ in range(2):
        engine.add(Request(prompt, 20, eos_token_ids=()))
        while engine.busy:
            finished = [event.answer for event in engine.step() if isinstance(event, Finished)]
        answers.append([finished[0].tokens, finished[0].reused_tokens])
        prompt = prompt + finished[0].tokens + [9] * 600
    results.append(answers)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def small_target(tmp_path_factory):
    """The folder of a random target with bytes as tokens."""
    folder = tmp_path_factory.mktemp("target") / "small"
    rng = np.random.default_rng(0)
    abstract = nnx.eval_shape(lambda: TargetModel(CONFIG, rngs=nnx.Rngs(0)))
    model = jax.tree.map(lambda x: jnp.asarray(rng.normal(float(x.ndim == 1), 0.2, x.shape), jnp.float32), abstract)
    save_target(model, folder, jnp.float32)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_devices_that_form_no_grid_are_named(monkeypatch):
    def fails(*_, **__):
        raise AssertionError("physical_mesh must be a cuboid")  # as JAX does for three of the four chips of a v5e:2x2

    monkeypatch.setattr("kangaroo_jax.model.sharding.mesh_utils.create_device_mesh", fails)
    with pytest.raises(InputError, match=r"mesh.model 3: 3 of these devices form no grid"):
        make_mesh({"data": 1, "fsdp": 1, "model": 3}, [None] * 3)


def on_virtual_devices(script, *arguments):
    """What a script prints last, in a process with 8 virtual CPU devices."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {os.environ['XLA_FLAGS']}",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def on_8_devices(small_target):
    """What one process with 8 devices makes of a small target, and the size of its file."""
    return on_virtual_devices(_ON_8_DEVICES, small_target), (small_target / "model.safetensors").stat().st_size


@pytest.mark.long
def test_losses_are_the_same_on_1_2_4_and_8_devices(on_8_devices):
    one, *others = (row["losses"] for row in on_8_devices[0]["rows"])
    assert len(set(one)) == 4
    for losses in others:
        np.testing.assert_allclose(losses, one, rtol=1e-5)


@pytest.mark.long
def test_a_draft_vocabulary_gives_the_same_figures_on_1_and_8_devices(on_8_devices):
    one, eight = on_8_devices[0]["reduced"]
    np.testing.assert_allclose(eight, one, rtol=1e-5)


@pytest.mark.long
def test_each_byte_of_the_checkpoint_is_read_once_and_each_device_holds_its_part(on_8_devices):
    result, size = on_8_devices
    # The process has all devices here, so it reads everything; twice would be a device that reads for itself.
    for row in result["rows"]:
        assert row["read"] == row["said"]
        assert row["read"] < 1.05 * size + 30 * 64 * 32 * 4  # and the fingerprint's first rows of each tensor
    held = [row["held"] for row in result["rows"]]
    for parts, found in zip((1, 2, 4, 4), held, strict=True):  # but norms and some biases, which are small
        assert held[0] / parts <= found < 1.2 * held[0] / parts


@pytest.mark.long
def test_decoding_on_4_devices_gives_the_tokens_and_accept_lengths_of_one(on_8_devices):
    one, four = on_8_devices[0]["decoded"][:2]
    assert one == four


_INT8 = """
import json, sys
import jax, numpy as np
from flax import nnx

from kangaroo_jax import DraftConfig, generate, load_target
from kangaroo_jax.checkpoint.adapter import TrainedAdapter
from kangaroo_jax.model import sharding
from kangaroo_jax.model.drafts.kangaroo import Adapter
from kangaroo_jax.model.naming import parameter_paths

folder, results, first = sys.argv[1], [], None
for sizes in ((1, 1, 1), (1, 1, 4), (1, 4, 1), (1, 2, 2)):
    mesh = sharding.make_mesh(dict(zip(("data", "fsdp", "model"), sizes)), jax.devices()[: np.prod(sizes)])
    target = load_target(folder, "float32", mesh, weights="int8")
    leaves = dict(zip(parameter_paths(target.model), jax.tree.leaves(target.model)))
    host = {path: np.asarray(x) for path, x in leaves.items()}
    first = first or host
    tokens = None
    if sizes[1] == 1:  # as decoding splits a model
        adapter = TrainedAdapter(Adapter(target.config, rngs=nnx.Rngs(3)), 1, "random", None)
        draft = DraftConfig(None, 3, 0.0)
        tokens = generate(target, adapter, [[5, 6, 7, 8], [9, 10, 11]], 30, draft, eos_token_ids=[]).tokens
    results.append({
        "same": all(np.array_equal(host[path], first[path]) for path in first),
        "tokens": tokens,
        "held": sum(x.addressable_shards[0].data.nbytes for path, x in leaves.items() if path.endswith("values")),
        "product": target.model.embed_tokens[...].product,
        "o_proj": [list(leaves[f"layers.0.self_attn.o_proj.{x}"].addressable_shards[0].data.shape)
                   for x in ("values", "scales")],
    })
print(json.dumps(results))
"""


@pytest.mark.long
def test_int8_weights_split_over_4_devices_are_those_of_one_and_give_its_tokens(small_target):
    one, *others = on_virtual_devices(_INT8, small_target)
    assert (one["product"], one["o_proj"]) == ("blocks", [[64, 32], [1, 32]])
    for found in others:
        assert found["same"]
        assert found["held"] == one["held"] / 4
        assert found["product"] == "direct"
    # The inputs are split along `model`, and each device has all scales; along `fsdp`, the outputs are, and scales too.
    assert [found["o_proj"] for found in others] == [[[16, 32], [1, 32]], [[64, 8], [1, 8]], [[32, 16], [1, 16]]]
    assert others[0]["tokens"] == one["tokens"]
    assert len(set(map(tuple, one["tokens"]))) == 2


@pytest.fixture(scope="module")
def batches(small_target):
    """A running batch on one device, and on meshes of (data, model) devices."""
    one, *meshes = on_virtual_devices(_A_BATCH, small_target, json.dumps([[1, 1], [1, 2], [2, 2], [1, 4], [4, 1]]))
    return one, meshes


@pytest.mark.long
def test_a_batch_on_a_mesh_gives_each_request_the_tokens_of_one_device(batches):
    one, meshes = batches
    kangaroo, plain = one["decoded"]
    assert [answer for answer in kangaroo if answer[0] != 2] == [answer for answer in plain if answer[0] != 2]  # greedy
    assert [reason for _, _, reason in kangaroo].count("stop") == 1
    for mesh in meshes:
        for found, expected in zip(mesh["decoded"], one["decoded"], strict=False):
            assert found == expected, mesh["mesh"]
        if mesh["mesh"] == [4, 1]:
            assert mesh["looked_up"] == one["looked_up"]
            assert sum(map(bool, itertools.chain.from_iterable(lengths for _, _, lengths in one["looked_up"]))) > 10


@pytest.mark.long
def test_a_long_prompt_alone_has_the_tokens_of_one_device(small_target, tmp_path):
    folder = shutil.copytree(small_target, tmp_path / "longer")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    one, two = on_virtual_devices(_ALONE, folder)
    assert one == two
    assert [reused > 700 for _, reused in one] == [False, True]


@pytest.mark.long
def test_each_device_holds_its_sequences_and_its_heads_alone(batches):
    one, meshes = batches
    capacity = one["shapes"][0][2]
    assert one["shapes"] == [[16, 8, capacity]] * 3 + [[4]]  # the CPU's own layout: 4 sequences x 4 heads
    for mesh in meshes:
        data, model = mesh["mesh"]
        assert mesh["shapes"] == [[4 // data, 4 // model, capacity, 8]] * 3 + [[4 // data]]


@pytest.mark.long
def test_a_round_gathers_no_cache(batches):
    one, meshes = batches
    cache = 4 * 4 * one["shapes"][0][2] * 8 * 4  # bytes of one layer's keys
    for mesh in meshes:
        # Logits of the split heads are gathered to choose tokens from.
        assert mesh["gathered"] < cache / 2, mesh["mesh"]
        if mesh["mesh"][1] == 1:  # devices agree on whether to go on, and on nothing of the size of a state or logits
            assert mesh["moved"] < 4 * 4 * CONFIG.hidden_size, mesh["mesh"]


@pytest.mark.long
def test_weights_in_the_memory_layouts_of_tpus_give_the_same_tokens(on_8_devices):
    plain, arranged = on_8_devices[0]["decoded"][:2], on_8_devices[0]["decoded"][2:]
    assert plain == arranged
    rows = [[0, 1, 2, 3], [0, 1], [0, 1, 2]]
    one, four = ([[1, 2, 3, 0], [0, 1], last] for last in ([1, 0, 2], [1, 2, 0]))
    # The MLP's 128 columns fill a TPU's lanes, a quarter of them does not.
    assert on_8_devices[0]["orders"] == [rows, rows, one, four]
