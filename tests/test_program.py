"""Reading compiled programs: operations against a count by hand, communication against programs written by hand."""

import jax
import jax.numpy as jnp

from kangaroo_jax.program import Collective, Launched, body, collectives, matmul_operations

TEXT = """
HloModule step

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %all-reduce.1 = f32[8]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %all-reduce.1)
}

%cond (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]{0}) parameter(0)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%fused_a (p: bf16[2,4]) -> bf16[4,4] {
  ROOT %all-gather.7 = bf16[4,4]{1,0:T(8,128)} all-gather(%p), channel_id=9, dimensions={0}
}

%fused_b (p: bf16[2,4]) -> bf16[4,4] {
  ROOT %all-gather.8 = bf16[4,4]{1,0:T(8,128)} all-gather(%p), channel_id=9, dimensions={0}
}

%unused (p: f32[64]) -> f32[64] {
  ROOT %all-reduce.9 = f32[64]{0} all-reduce(%p), channel_id=5, to_apply=%add
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %start = (f32[2]{0}, f32[4]{0}) all-gather-start(%a), channel_id=3, dimensions={0}
  %done = f32[4]{0} all-gather-done(%start)
  %f = bf16[4,4]{1,0} fusion(%b), kind=kCustom, calls=%fused_a
  %g = bf16[4,4]{1,0} fusion(%b), kind=kCustom, calls=%fused_b
  %both = (f32[8]{0}, s8[3]{0}) reduce-scatter(%a, %c), channel_id=4, dimensions={0}, to_apply=%add
  ROOT %w = (s32[], f32[8]{0}) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""


def test_collectives_count_loops_asynchronous_ones_once_and_spread_ones_once():
    assert collectives(TEXT) == {
        "all-gather": Collective(2, 4 * 4 + 16 * 2),
        "all-reduce": Collective(5, 5 * 8 * 4),
        "reduce-scatter": Collective(1, 8 * 4 + 3),
    }


LOOPS = """
HloModule rounds

%fused (p: f32[8]) -> f32[8] {
  ROOT %a = f32[8]{0} add(%p, %p), backend_config={"estimated_cycles":"1000"}
}

%inner (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x = f32[8]{0} fusion(%p), calls=%fused, metadata={op_name="jit(f)/while/body/draft/while/body/add"}, backend_config={"flag_configs":[],"estimated_cycles":"7"}
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %x)
}

%outer (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %w = (s32[], f32[8]{0}) while(%p), condition=%c, body=%inner, metadata={op_name="jit(f)/while/body/draft/while"}
  %y = f32[8]{0} fusion(%w), calls=%fused, metadata={op_name="jit(f)/while/body/draft/mul"}, backend_config={"estimated_cycles":"20"}
  %z = f32[8]{0} copy(%y), backend_config={"estimated_cycles":"300"}
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %z)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %start = (f32[8]{0}, f32[8]{0}, u32[]) copy-start(%a)
  %done = f32[8]{0} copy-done(%start)
  ROOT %w = (s32[], f32[8]{0}) while(%t), condition=%c, body=%outer, metadata={op_name="jit(f)/while"}
}
"""  # noqa: E501


def test_a_body_has_its_own_instructions_by_scope_and_loops_apart():
    entry = body(LOOPS)
    assert (entry.name, entry.all) == ("", Launched(0, 0))
    (outer,) = entry.loops
    assert (outer.name, outer.all, outer.within("draft")) == ("jit(f)/while", Launched(2, 320), Launched(1, 20))
    (inner,) = outer.loops
    assert (inner.name, inner.all) == ("jit(f)/while/body/draft/while", Launched(1, 7))


def test_what_is_launched_in_two_halves_counts_once_and_a_run_with_loops_is_not_known():
    assert body(TEXT).all == Launched(4, 0)
    assert body(TEXT).without_loops is None
    (loop,) = body(TEXT).loops
    assert loop.without_loops * 3 == Launched(3, 0)


def test_matmul_operations_count_loops_branches_and_remade_products():
    def work(x, weights):
        def layer(x, weight):
            return jnp.tanh(x @ weight), None

        x, _ = jax.lax.scan(layer, x, weights)
        return jax.lax.cond(x[0, 0] > 0, lambda: x, lambda: x @ weights[0])

    jaxpr = jax.make_jaxpr(work)(jnp.ones((3, 4)), jnp.ones((5, 4, 4))).jaxpr
    assert matmul_operations(jaxpr) == 6 * (2 * 3 * 4 * 4)
