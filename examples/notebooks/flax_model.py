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
# # Your Flax model over a context axis
#
# A transformer that you have, in Flax NNX, trains on a sequence that is spread over eight devices. What changes: the
# `attention_fn` of its attention layers, where positions come from, and that
# tokens are laid out once. What does not: parameters, losses, the training loop.

# %%
import jax
import jax.numpy as jnp

jax.config.update("jax_num_cpu_devices", 8)  # before jax touches a device

import matplotlib.pyplot as plt
import optax
from flax import nnx

import ring_jax
from ring_jax.nn import apply_rope

S, width, heads, vocabulary = 512, 64, 4, 32

# %% [markdown]
# ## The model, with the context as one argument


# %%
class Block(nnx.Module):
    def __init__(self, attention_fn, rngs):
        self.norm1, self.norm2 = nnx.RMSNorm(width, rngs=rngs), nnx.RMSNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, attention_fn=attention_fn, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class Model(nnx.Module):
    def __init__(self, cp, rngs):
        # Rotary positions are those of the layout, which the adapter knows.
        attention_fn = cp.attention_fn(is_causal=True, seq_len=S, rope=apply_rope)
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.blocks = nnx.List([Block(attention_fn, rngs) for _ in range(2)])
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def context(ranks):
    mesh = jax.make_mesh(
        (ranks,), ("context",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:ranks]
    )
    return ring_jax.ContextParallel("context", layout="zigzag", mesh=mesh, strategy="ring")


# %% [markdown]
# ## A task that needs the whole sequence
#
# The second half of a text repeats its first half: a token can only be predicted by looking 256 positions back, which
# is on another device.


# %%
def batch(step):
    half = jax.random.randint(jax.random.key(step), (4, S // 2), 0, vocabulary)
    tokens = jnp.concatenate([half, half], axis=1)
    labels = jnp.roll(tokens, -1, axis=1)  # shifted before they are laid out: then neighbours need not be neighbours
    counts = jnp.broadcast_to(jnp.arange(S) >= S // 2 - 1, tokens.shape).at[:, -1].set(False)
    return tokens, labels, counts.astype(jnp.float32)


def train(ranks, steps=25):
    cp = context(ranks)
    model = Model(cp, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, tokens, labels, counts):
        def loss_of(model):
            losses = optax.softmax_cross_entropy_with_integer_labels(model(tokens), labels)
            return (losses * counts).sum() / counts.sum()

        loss, gradients = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, gradients)
        return loss

    losses = [float(step(model, optimizer, *(cp.to_layout(x) for x in batch(i)))) for i in range(steps)]
    return model, losses


model, losses_8 = train(8)
_, losses_1 = train(1)

# %% [markdown]
# ## The same losses, over one device and over eight

# %%
figure, axes = plt.subplots(figsize=(7, 3))
axes.plot(losses_1, linewidth=4, alpha=0.4, label="one rank")
axes.plot(losses_8, "--", label="eight ranks")
axes.set(xlabel="step", ylabel="loss")
axes.legend()
plt.show()
first, last = (
    max(abs(a - b) / b for a, b in zip(x, y)) for x, y in ((losses_8[:10], losses_1[:10]), (losses_8, losses_1))
)
print(f"relative difference: {first:.1e} in the first ten steps, {last:.1e} at most")
assert first < 1e-4

# %% [markdown]
# ## A forgotten `to_layout` is noticed
#
# Nothing in an array says in which order it lies. `check_layout` runs a function over the context and on one rank,
# where every layout is the natural order:

# %%
cp = context(8)


def right(cp, x):
    return cp.from_layout(ring_jax.ring_attention(*[cp.to_layout(x)] * 3, is_causal=True, context=cp), x.shape[1])


def wrong(cp, x):
    return ring_jax.ring_attention(x, x, x, is_causal=True, context=cp)


x = jax.random.normal(jax.random.key(1), (1, 64, 2, 8))
print("right:", cp.check_layout(right, x))
try:
    cp.check_layout(wrong, x)
except ValueError as error:
    print("wrong:", str(error)[:200])
