"""What a preflight predicts, against counts by hand, and what compilers make of small models."""

import dataclasses
import importlib.util
import re

import jax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding

from kangaroo_jax import DraftConfig, program
from kangaroo_jax.cli.preflight_flag import show
from kangaroo_jax.config import AdapterConfig
from kangaroo_jax.engine.part_costs import PartCounts
from kangaroo_jax.engine.shapes import PIECE
from kangaroo_jax.model import sharding
from kangaroo_jax.model.drafts.kinds import abstract_adapter
from kangaroo_jax.model.naming import parameter_paths
from kangaroo_jax.model.target import TargetModel
from kangaroo_jax.preflight import compiling
from kangaroo_jax.preflight.decoding import Work, decoding
from kangaroo_jax.preflight.machines import Limits, Machine, find_machine
from kangaroo_jax.preflight.prediction import PartPredictor, RoundWork, decoding_prediction, part
from kangaroo_jax.program import Body, Launched
from tests.bench.models import CONFIG
from tests.test_preflight import TARGET

LIMITS = Limits(100.0, {"float32": 1000.0}, share=0.5, launch=0.125, turn=0.25)


def test_a_device_reads_and_multiplies_its_part_of_what_is_split():
    mesh = AbstractMesh((1, 1, 2), sharding.AXES)

    def placed(tree):
        leaves, structure = jax.tree.flatten(tree)
        where = sharding.shardings(dict(zip(parameter_paths(tree), leaves, strict=True)), mesh)
        shapes = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
            for x, place in zip(leaves, where.values(), strict=True)
        ]
        return jax.tree.unflatten(structure, shapes)

    model = placed(nnx.eval_shape(lambda: TargetModel(CONFIG, rngs=nnx.Rngs(0), dtype=jax.numpy.bfloat16)))
    adapter = placed(abstract_adapter(CONFIG, jax.numpy.bfloat16, AdapterConfig("kangaroo")))
    assert isinstance(jax.tree.leaves(model)[0].sharding, NamedSharding)
    attention, mlp, norms, head = 32 * 64 + 32 * 32, 3 * 32 * 48, 2 * 32, 100 * 32
    cached = 2 * 3 * 1 * 128 * 8  # keys and values of 3 sequences, 1 of the 2 heads
    layer, read = (attention + mlp) // 2, 2 * ((attention + mlp) // 2 + norms + cached)
    adapter_read = 2 * (attention // 2 + norms + cached)
    assert PartCounts.of_bytes(model, adapter, 1, [cached] * 2) == PartCounts(
        plain_step=2 * read + head,
        shallow=read,
        draft_step=read + adapter_read + head,
        verification=read + head,
        head=head,
        adapter=adapter_read,
    )
    # Two queries share each key: 2 products of 2 operations each, for keys and for values.
    work, head_work = 3 * 2 * layer + 2 * 2 * cached, 3 * head
    assert PartCounts.of_operations(model, adapter, 1, 3, [cached] * 2) == PartCounts(
        plain_step=2 * work + head_work,
        shallow=work,
        draft_step=work + 3 * attention + 2 * 2 * cached + head_work,
        verification=work + head_work,
        head=head_work,
        adapter=3 * attention + 2 * 2 * cached,
    )


def test_a_part_takes_the_longer_of_reading_and_multiplying_and_what_it_starts():
    assert part("reads", 200, 3000, LIMITS, "float32").seconds == 200 / 50
    assert part("multiplies", 100, 3000, LIMITS, "float32").seconds == 3
    found = part("starts", 100, 1, LIMITS, "float32", Launched(8, 70), turns=2)
    assert (found.kernels, found.cycles, found.seconds) == (8, 70, 2 + 8 * 0.125 + 2 * 0.25)
    tpu = Limits(100.0, {"float32": 1000.0})
    assert part("nothing to start", 100, 1, tpu, "float32", Launched(8, 70)).kernels == 0


def test_the_cost_of_a_round_follows_from_its_parts():
    counted = PartCounts(1000, 100, 150, 950, 50, 30), PartCounts(10, 1, 2, 9, 1, 1)
    work = RoundWork(*(Launched(n, 10 * n) for n in (16, 2, 4, 14)))
    prefill = part("prefill", 1, 1, LIMITS, "float32")
    settings = {"width": 4, "rows": 1, "max_draft_len": 3, "batch": 5, "cached": 600}
    found = decoding_prediction(PartPredictor(LIMITS, "float32", *counted, work), prefill, **settings)
    assert found.times.plain_step == 1000 / 50 + 16 * 0.125
    drafted = 3 * (150 / 50 + 4 * 0.125 + 0.25)
    assert found.times.round_seconds(3) == pytest.approx(drafted + 100 / 50 + 2 * 0.125 + 950 / 50 + 14 * 0.125)
    assert found.cycles.round_cost(3) == pytest.approx((3 * 40 + 20 + 140) / 160)
    assert [x.name for x in found.parts][3:] == [*(f"verification of {n}" for n in (1, 4, 8, 16, 32)), "prefill"]
    assert {x.name: x.cycles for x in found.parts}["verification of 8"] == 0
    without = decoding_prediction(PartPredictor(LIMITS, "float32", *counted, None), prefill, **settings)
    assert (without.cycles, without.times.plain_step) == (None, 20)


def test_what_remembers_is_read_once_a_round():
    model = nnx.eval_shape(lambda: TargetModel(CONFIG, rngs=nnx.Rngs(0)))
    counts = {}
    for kind in ("kangaroo", "memory"):
        adapter = abstract_adapter(CONFIG, jax.numpy.float32, AdapterConfig(kind))
        counts[kind] = PartCounts.of_bytes(model, adapter, 1)
    memory = 4 * (32 + 4 * 32 * 32)  # a norm, and a matrix for each of 4 depths
    assert (counts["kangaroo"].once, counts["memory"].once) == (0, memory)
    assert dataclasses.replace(counts["memory"], once=0) == counts["kangaroo"]
    predictor = PartPredictor(Limits(1e3, {"float32": 1e30}), "float32", counts["memory"], PartCounts(*[0] * 6), None)
    parts = (
        predictor.draft_step().seconds,
        predictor.shallow().seconds,
        predictor.verification(4, compiled=True).seconds,
    )
    assert predictor.round_seconds(3) == pytest.approx(3 * parts[0] + sum(parts[1:]) + memory / 1e3)


def test_a_long_prompt_s_prefill_reads_weights_and_its_own_caches_in_each_piece():
    config = dataclasses.replace(CONFIG, max_position_embeddings=4096)
    machine = Machine("here", jax.devices(), None, LIMITS)
    draft, prompt = DraftConfig(1, 2), 2 * PIECE + 76  # 3 pieces
    attention, mlp, norms, head = 32 * 64 + 32 * 32, 3 * 32 * 48, 2 * 32, 100 * 32
    for batch in (1, 8):
        mesh = sharding.decoding_mesh(1, machine.devices[:1])
        work = Work(config, None, "float32", draft, prompt, 2000, machine, mesh, batch)
        # In caches of its own, or in those of a batch that it is alone, which have room for twice as much as the prompt
        # and the next chunk, and will have for all of the answer.
        capacity = 3072 if batch == 1 else work._plan.prompt_capacity
        assert work._plan.prompt_capacity < capacity or batch > 1
        assert work._capacity == 4096
        read = 4 * 2 * (attention + mlp + norms + 2 * 2 * 8 * capacity)  # keys and values of 2 heads of 8
        found = work.predicted_prefill(Launched(5, 70))
        assert (found.num_bytes, found.kernels, found.cycles) == (3 * read + 4 * head, 15, 210)
        # Of each of its tokens, padded to 128 in the last piece: the products of both layers, and 2 of attention for 4
        # heads; of the last, the head.
        operations = 2 * 2 * (attention + mlp) + 2 * 2 * 2 * 4 * 8 * capacity
        assert found.operations == (2 * PIECE + 128) * operations + 2 * head


def test_what_a_round_launches_is_told_apart_by_loops_and_scopes():
    def body(name, *instructions, loops=()):
        return Body(name, tuple((scope, Launched(1, cycles)) for scope, cycles in instructions), loops)

    plain = body("", loops=(body("f/while", ("f/while/body/verify/deep/dot", 90), ("f/while/body/shallow/dot", 10)),))
    one = body("f/while/body/draft/while", ("f/while/body/draft/while/body/adapter/dot", 7))
    before = ("f/while/body/draft/shallow/dot", 5), ("f/while/body/draft/adapter/dot", 8)
    turn = body("f/while", *before, ("f/while/body/verify/dot", 80), ("f/while/body/commit/add", 1), loops=(one,))
    found = RoundWork.of(plain, body("", loops=(turn,)))
    assert found == RoundWork(Launched(2, 100), Launched(1, 6), Launched(1, 7), Launched(2, 81))
    assert RoundWork.of(plain, body("", loops=(body("f/while"),))) is None


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra: preflight)")
def test_no_product_is_left_to_the_vector_unit_of_a_tpu_and_caches_keep_their_order(monkeypatch, capsys):
    """XLA for TPU calls a product on the matrix unit a convolution. On the vector unit, a product is a multiplication
    and a sum: by default each that has one row, all but attention's in plain decoding."""
    asked, made = {}, {}
    compiled = compiling.compiled

    def seen(name, function, inputs, *rest):
        def products(jaxpr):
            """How many are asked for; of branches, in one."""
            total = 0
            for equation in jaxpr.eqns:
                inner = [products(part) for part in program._inner(equation.params)]
                total += equation.primitive.name == "dot_general"
                total += max(inner) if equation.primitive.name == "cond" else sum(inner)
            return total

        asked[name] = products(function.trace(*inputs).jaxpr.jaxpr)
        monkeypatch.setattr(program, "body", lambda text: made.update({name: text}) or body(text))
        return compiled(name, function, inputs, *rest)

    body = program.body
    monkeypatch.setattr("kangaroo_jax.preflight.decoding.compiled", seen)
    report = decoding(str(TARGET), "bfloat16", DraftConfig(2, 2), 64, 32, 1, find_machine("v5e:1x1"))
    assert set(made) == {"prefill", "rounds (operations and communication of one)", "plain rounds"}
    for name in ("rounds (operations and communication of one)", "plain rounds"):
        assert len(re.findall(r"= \S+ convolution\(", made[name])) >= asked[name], name
    assert asked["plain rounds"] == 8 * 6 + 1
    (loop,) = re.findall(r"\n.* while\(", made["plain rounds"])
    # From the fastest axis of a cache to the slowest, as between programs: else it would be copied at both ends.
    assert set(re.findall(r"bf16\[1,2,512,32\]\{([\d,]+)", loop)) == {"3,2,1,0"}
    assert report.prediction.cycles.plain_step > 0
    assert show(report) is True
    assert "\nby the compiler's cycles, a round of 2 costs " in capsys.readouterr().out
