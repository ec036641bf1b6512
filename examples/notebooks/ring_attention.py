# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Ring attention from nothing
#
# Attention over a sequence that is spread over devices, built by hand in a few lines, then with `ring_jax`. One CPU
# stands in for eight
# devices; on GPUs the same code runs on what is there.

# %%
import jax
import jax.numpy as jnp

jax.config.update("jax_num_cpu_devices", 8)  # before jax touches a device

import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

import ring_jax
from ring_jax import plot

C, S, heads, head_size = 8, 1024, 4, 32
mesh = jax.make_mesh((C,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
query, key, value = (jax.random.normal(jax.random.key(i), (1, S, heads, head_size)) for i in range(3))

# %% [markdown]
# ## One row of attention can be computed in parts
#
# The softmax over all keys needs all keys; but its numerator and denominator are sums. So attention to *some* keys is
# worth keeping if we keep
# two things: the result, and the logarithm of the denominator (the LSE). Two such partial results merge exactly.


# %%
def block(query, key, value, visible):
    """Attention to some keys: (out, lse)."""
    logits = jnp.einsum("btnh,bsnh->btns", query, key) * head_size**-0.5
    logits = jnp.where(visible[None, :, None, :], logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None])
    return jnp.einsum("btns,bsnh->btnh", weights, value), lse


def merge(a, b):
    """The partial result over the keys of both."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    lse = jnp.logaddexp(lse_a, lse_b)
    weight = lambda part: jnp.exp(jnp.where(jnp.isfinite(lse), part - lse, -jnp.inf))[..., None]
    return weight(lse_a) * out_a + weight(lse_b) * out_b, lse


causal = jnp.arange(S)[:, None] >= jnp.arange(S)[None]
whole, _ = block(query, key, value, causal)
half = S // 2
left = block(query, key[:, :half], value[:, :half], causal[:, :half])
right = block(query, key[:, half:], value[:, half:], causal[:, half:])
print("largest difference:", float(abs(merge(left, right)[0] - whole).max()))

# %% [markdown]
# ## A ring
#
# Every device holds a stretch of queries, keys and values. Keys and values travel around the ring of devices; each
# device attends to what is here, merges, and hands
# it on. After C - 1 hops everybody has seen everything, and nobody has held more than two shards.


# %%
def by_hand(query, key, value):
    """On one device's shards."""
    rank, shard = lax.axis_index("context"), query.shape[1]
    mine = rank * shard + jnp.arange(shard)
    partial, source = None, rank
    for hop in range(C):
        theirs = source * shard + jnp.arange(shard)
        here = block(query, key, value, mine[:, None] >= theirs[None])
        partial = here if partial is None else merge(partial, here)
        if hop < C - 1:
            to_next = [(i, (i + 1) % C) for i in range(C)]
            key, value = (lax.ppermute(x, "context", to_next) for x in (key, value))
            source = (source - 1) % C
    return partial[0]


spread = P(None, "context")
ring = jax.jit(jax.shard_map(by_hand, mesh=mesh, in_specs=(spread,) * 3, out_specs=spread))
print("largest difference:", float(abs(ring(query, key, value) - whole).max()))
permutes = ring.lower(query, key, value).compile().as_text().count(" collective-permute(")
print("permutes in the compiled program:", permutes)

# %% [markdown]
# ## Why contiguous stretches are unfair
#
# A causal mask lets early queries see few keys. With contiguous stretches the first device is idle most of the time
# while the last one sets the pace. The *zigzag* layout gives every
# device an early and a late stretch.

# %%
plot.layouts(S, C)

# %%
plot.ranks(S, C)

# %% [markdown]
# ## With ring_jax
#
# `ContextParallel` says how arrays are spread; `to_layout` cuts and pads; `ring_attention` takes the arguments of
# `jax.nn.dot_product_attention`. Tiles that a mask hides are skipped, bounds
# are exact for every layout, the backward is one custom rule around the whole ring.

# %%
cp = ring_jax.ContextParallel("context", layout="zigzag", mesh=mesh, strategy="ring")
cp

# %%
laid = [cp.to_layout(x) for x in (query, key, value)]
attend = jax.jit(lambda q, k, v: ring_jax.ring_attention(q, k, v, is_causal=True, seq_len=S, context=cp))
out = cp.from_layout(attend(*laid), S)
difference = float(abs(out - whole).max())
print("largest difference:", difference)
assert difference < 1e-5

# %% [markdown]
# Each device holds an eighth of the output, and the lengths of the work are equal:

# %%
print({shard.data.shape for shard in attend(*laid).addressable_shards})
from ring_jax.layout import work_per_rank

for layout in ("contiguous", "zigzag"):
    work = np.asarray(work_per_rank(np.zeros(S, int), np.arange(1, S + 1), layout, C))
    print(f"{layout:10s} slowest rank over the mean: {work.max() / work.mean():.2f}")
