"""Counting collectives in compiled programs, loops included."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from ring_jax.commands.collectives import count_collectives


def compiled(body):
    mesh = Mesh(np.asarray(jax.devices()[:4]), ("x",))
    mapped = jax.shard_map(body, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"))
    return jax.jit(mapped).lower(jnp.zeros((8, 8))).compile().as_text()


def shift(x):
    return jax.lax.ppermute(x, "x", [(i, (i + 1) % 4) for i in range(4)])


def test_unrolled_and_in_loops():
    def step(x, _):
        return jnp.sin(shift(x)), None

    assert count_collectives(compiled(shift)) == {"collective-permute": 1}
    assert count_collectives(compiled(lambda x: shift(jnp.sin(shift(x))))) == {"collective-permute": 2}
    looped = compiled(lambda x: jax.lax.scan(step, shift(x), length=5)[0])
    assert count_collectives(looped) == {"collective-permute": 6}


def test_kinds_in_text():
    hlo = """
HloModule m
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}
%even (p: f32[2]) -> f32[2] {
  ROOT %r = f32[2]{0} all-reduce(%p), replica_groups={}, to_apply=%add
}
%odd (p: f32[2]) -> f32[2] {
  ROOT %r = f32[2]{0} all-to-all(%p), dimensions={0}
}
ENTRY %main (p: f32[2]) -> f32[2] {
  %g = (f32[2]{0}, f32[4]{0}) all-gather-start(%p), dimensions={0}
  %d = f32[4]{0} all-gather-done(%g)
  ROOT %c = f32[2]{0} conditional(%i, %p, %p), branch_computations={%even, %odd}
}
"""
    assert count_collectives(hlo) == {"all-gather": 1, "all-reduce": 1, "all-to-all": 1}


def test_no_collectives():
    assert count_collectives(jax.jit(jnp.sin).lower(jnp.zeros(3)).compile().as_text()) == {}
