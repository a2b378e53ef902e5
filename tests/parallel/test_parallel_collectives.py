"""What programs exchange, read from texts as XLA writes them and from a program that it compiles here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxopt_lab import parallel

# As for a GPU and a TPU: operations that are split in two, layouts with tiles, comments, a loop whose length is known inside of
# another, and one that a wrapper calls.
TEXT = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8,128]{1,0:T(8,128)})->f32[8,128]{1,0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%wrapped (p: f32[8,128]) -> f32[1,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %scattered = f32[1,128]{1,0:T(1,128)} reduce-scatter(%p), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, to_apply=%add
}

%inner (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %t = (s32[], f32[4]{0}) parameter(0)
  %v = f32[4]{0} get-tuple-element(%t), index=1
  %moved = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%v), source_target_pairs={{0,1},{1,0}}
  %done = f32[4]{0} collective-permute-done(%moved)
  ROOT %out = (s32[], f32[4]{0}) tuple(%t, %done)
}

%outer (t.1: (s32[], f32[4])) -> (s32[], f32[4]) {
  %t.1 = (s32[], f32[4]{0}) parameter(0)
  ROOT %w = (s32[], f32[4]{0}) while(%t.1), condition=%less, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
}

%branch.1 (x.1: pred[16]) -> pred[16] {
  %x.1 = pred[16]{0} parameter(0)
  ROOT %any = pred[16]{0} all-reduce(%x.1), replica_groups={}, to_apply=%or
}

ENTRY %main (x: f32[8,128], y: bf16[3], z: s4[6], i: s32[]) -> f32[8,128] {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0)
  %y = bf16[3]{0} parameter(1)
  %z = s4[6]{0:E(4)} parameter(2)
  %i = s32[] parameter(3)
  %started = (f32[8,128]{1,0}, bf16[3]{0}, /*index=2*/s4[6]{0:E(4)}) all-reduce-start(%x, %y, /*index=2*/%z), to_apply=%add
  %ended = (f32[8,128]{1,0}, bf16[3]{0}, /*index=2*/s4[6]{0:E(4)}) all-reduce-done(%started)
  %gathering = ((bf16[3]{0}), bf16[24]{0}) all-gather-start(%y), dimensions={0}
  %gathered = bf16[24]{0} all-gather-done(%gathering)
  %begun = ((f32[8,128]{1,0}), f32[1,128]{1,0}) async-start(%x), calls=%wrapped
  %loop = (s32[], f32[4]{0}) while(%tuple), condition=%less.1, body=%outer, backend_config={"known_trip_count":{"n":"5"}}
  %open = (s32[], f32[4]{0}) while(%loop), condition=%less.1, body=%inner
  %chosen = pred[16]{0} conditional(%i, %p0, %p1), branch_computations={%branch.0, %branch.1}
  ROOT %result = f32[8,128]{1,0} copy(%x), metadata={op_name="all-reduce(%x)"}
}
"""


def test_a_program_of_another_machine():
    assert parallel.collectives(TEXT) == [
        ("all-reduce", 8 * 128 * 4 + 3 * 2 + 6 // 2, 1, 3, False, True),
        ("all-gather", 48, 1, 1, False, True),
        ("reduce-scatter", 4096, 1, 1, False, True),
        ("collective-permute", 16, 15, 1, False, True),
        ("collective-permute", 16, 1, 1, False, False),
        ("all-reduce", 16, 1, 1, True, True),
    ]


def test_a_program_that_is_compiled_here():
    mesh = Mesh(np.array(jax.devices()), ("d",))

    def body(x):
        x = jax.lax.scan(lambda c, _: (c + jax.lax.psum(c, "d"), None), x, None, length=5)[0]
        x = jax.lax.cond(x[0] > 0, lambda x: x + jax.lax.all_gather(x, "d").sum(0), lambda x: x, x)
        turn = [(k, (k + 1) % 8) for k in range(8)]
        x = jax.lax.while_loop(lambda x: x[0] < 9, lambda x: x + jax.lax.ppermute(x, "d", turn), x)
        return jax.lax.psum_scatter(x, "d", tiled=True)

    spec = PartitionSpec("d")
    mapped = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    lowered = mapped.lower(jnp.ones(512))
    assert parallel.collectives(lowered.compile()) == [
        ("all-reduce", 256, 5, 1, False, True),
        ("all-gather", 2048, 1, 1, True, True),
        ("collective-permute", 256, 1, 1, False, False),
        ("reduce-scatter", 256, 1, 1, False, True),
    ]
    with pytest.raises(ValueError, match=r"\.compile\(\); got Lowered 'module @jit_body"):
        parallel.collectives(lowered)


def test_one_device_exchanges_nothing():
    assert parallel.collectives(jax.jit(lambda x: x + 1).lower(jnp.ones(3)).compile()) == []
