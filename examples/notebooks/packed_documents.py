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
# # Packed documents and masks
#
# Short documents are packed into one long row. A token may see only what stands before it in its own document,
# wherever the row is cut between devices.

# %%
import jax
import jax.numpy as jnp

jax.config.update("jax_num_cpu_devices", 8)  # before jax touches a device

import numpy as np

import ring_jax
from ring_jax import plot

C, S = 8, 2048
mesh = jax.make_mesh((C,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
lengths = np.random.default_rng(3).dirichlet(np.full(12, 0.7)) * (S - 48)
borders = np.concatenate([[0], np.cumsum(np.round(lengths).astype(int))])
print("documents of", np.diff(borders), "tokens;", S - borders[-1], "tokens of padding")

# %% [markdown]
# ## A mask is one interval of keys for each query
#
# Masks are values, combined with `&`. They speak of positions in natural order. Rows of the picture are queries, in
# the colour of the rank that computes them.

# %%
mask = ring_jax.causal() & ring_jax.documents(cu_seqlens=jnp.asarray(borders, jnp.int32))
mask

# %%
plot.mask(mask, S, layout="zigzag", ranks=C)

# %%
plot.mask(mask & ring_jax.window(64, 0), S, layout=ring_jax.Zigzag(block=64), ranks=C)

# %% [markdown]
# ## Which layout balances it
#
# Two chunks a rank balance one long causal text, but not documents of random length: whoever holds the long document
# works longest. Small blocks, dealt forth and back, do.

# %%
plot.work(S, C, mask=mask, names=("contiguous", "zigzag", ring_jax.Zigzag(block=32)))

# %% [markdown]
# ## The numbers are those of each document alone

# %%
cp = ring_jax.ContextParallel("context", layout=ring_jax.Zigzag(block=32), mesh=mesh, strategy="ring")
query, key, value = (jax.random.normal(jax.random.key(i), (1, S, 4, 32)) for i in range(3))
attend = jax.jit(lambda q, k, v: ring_jax.ring_attention(q, k, v, mask=mask, seq_len=S, context=cp))
out = cp.from_layout(attend(*(cp.to_layout(x) for x in (query, key, value))), S)

worst = 0.0
for begin, end in zip(borders[:-1], borders[1:]):
    if end > begin:
        alone = jax.nn.dot_product_attention(*(x[:, begin:end] for x in (query, key, value)), is_causal=True)
        worst = max(worst, float(abs(out[:, begin:end] - alone).max()))
print("largest difference to documents alone:", worst)
print("padding gives", float(abs(out[:, borders[-1] :]).max()))
assert worst < 1e-5

# %% [markdown]
# ## Segment ids, and what is no interval
#
# The same documents as ids: contiguous runs, negative ids are padding. Ids that come back are an error, under jit a
# check of its own tells.

# %%
ids = np.repeat(np.arange(len(borders) - 1), np.diff(borders))
ids = np.concatenate([ids, np.full(S - len(ids), -1)])
by_ids = ring_jax.causal() & ring_jax.documents(segment_ids=jnp.asarray(ids[None], jnp.int32))
same = jax.jit(lambda q, k, v: ring_jax.ring_attention(q, k, v, mask=by_ids, seq_len=S, context=cp))
again = cp.from_layout(same(*(cp.to_layout(x) for x in (query, key, value))), S)
print("ids against borders:", float(abs(again - out).max()))
print("one run each:", ring_jax.contiguous_segments(jnp.asarray(ids[None])))
for bad in (
    lambda: ring_jax.documents(segment_ids=jnp.asarray([[0, 1, 0]])),
    lambda: ring_jax.prefix(4) & ring_jax.window(8, 0),
):
    try:
        bad()
    except (ValueError, NotImplementedError) as error:
        print(f"{type(error).__name__}: {str(error)[:150]}")
