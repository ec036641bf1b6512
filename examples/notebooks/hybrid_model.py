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
# # A hybrid model: long prompt, chunks, prefix hits
#
# Three of four layers of Qwen3.5 keep a state of fixed size (gated delta rule), every fourth keeps the keys and values of all
# tokens. Serving such a model over several devices, a long prompt comes in chunks between the tokens of others, its keys lie
# spread in pages, and a second question about the same text costs its own tokens only.

# %%
import jax

jax.config.update("jax_num_cpu_devices", 4)  # before jax touches a device

import matplotlib.pyplot as plt
import numpy as np

import ring_jax
from ring_jax.data import passkey
from ring_jax.inference import Engine
from ring_jax.inference.tokenizer import Tokenizer
from ring_jax.models.qwen3_5 import Qwen3_5, Sharding

C = 4
mesh = jax.make_mesh((C,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
cp = ring_jax.ContextParallel("context", layout="zigzag", mesh=mesh)
model = Qwen3_5.from_pretrained(passkey.MODEL, dtype=jax.numpy.float32, sharding=Sharding(cp))
tokenizer = Tokenizer(passkey.MODEL)
print([kind.split("_")[0] for kind in model.config.layer_types])

# %% [markdown]
# The bundled model has read Python's documentation and finds a pass key hidden in it.

# %%
document = passkey.pass_key_text("31415", length=2000, depth=0.4)
prompt = tokenizer.encode(document.prompt)
engine = Engine(model, rows=3, chunk=512, decode_steps=2, pages=64, snapshots=32)
print(engine)

# %% [markdown]
# ## Where the keys lie
#
# A page holds neighbouring tokens, a part of it on each device: position t lies on rank (t // p) mod C, p tokens a page and
# rank. So every device holds its share of every text, whatever its length, and no text moves when it grows.

# %%
p = engine.geometry.page
rank = np.arange(len(prompt)) // p % C
figure, axis = plt.subplots(figsize=(9, 1.6))
axis.imshow(rank[None], aspect="auto", interpolation="nearest", cmap="tab10", vmin=0, vmax=9)
axis.set(yticks=[], xlabel="position in the text", title=f"rank that holds its keys: {p} tokens each in turn")
counts = np.bincount(rank, minlength=C)
print("tokens on each rank:", counts.tolist())
assert counts.max() - counts.min() <= p

# %% [markdown]
# ## A long prompt between the tokens of a short one
#
# A short text is being written when the long prompt arrives. Each step computes one chunk of the prompt, then some tokens of
# whatever runs: the short text waits for a chunk at a time, not for the prompt.

# %%
short = engine.submit(tokenizer.encode("Once upon a time"), max_new_tokens=16, stop_ids=())
engine.step()
long = engine.submit(prompt, max_new_tokens=8)
steps = []
while not long.done or not short.done:
    before = engine.stats().prefilled_tokens, len(short.tokens), len(long.tokens)
    engine.step()
    after = engine.stats().prefilled_tokens, len(short.tokens), len(long.tokens)
    steps.append(np.subtract(after, before))
chunk, of_short, of_long = np.transpose(steps)

figure, axes = plt.subplots(2, 1, figsize=(9, 4), sharex=True, layout="constrained")
axes[0].bar(range(len(steps)), chunk, color="tab:gray")
axes[0].set(ylabel="prompt tokens", title="what each step computed")
axes[1].bar(range(len(steps)), of_short, label="short text")
axes[1].bar(range(len(steps)), of_long, bottom=of_short, label="long text")
axes[1].set(xlabel="step", ylabel="new tokens")
axes[1].legend()
print(repr(tokenizer.decode(long.tokens)), "in chunks of", chunk[chunk > 0].tolist())
assert tokenizer.decode(long.tokens) == document.answer and chunk.max() <= engine.chunk
assert chunk.sum() == long.prefilled_tokens == len(prompt) - 1

# %% [markdown]
# ## Prefix hits
#
# A hit needs both: the keys of a beginning, and the states of the other layers where it ends. Pages of keys are found by the
# token ids in them; states are kept where chunks and texts ended. The next question of the conversation goes on where the last
# answer ended, and computes what is new.

# %%
talk, turns = prompt + long.tokens, []
for turn in range(3):
    talk += tokenizer.encode(passkey.QUESTION)
    answer = engine.submit(talk, max_new_tokens=8)
    talk = talk + list(answer)
    turns.append((f"question {turn + 2}", answer.hit_tokens, answer.prefilled_tokens))

# %% [markdown]
# Another reader asks something else about the same text. The first one to part from it finds keys, but no state, at the place
# where the texts part. From then on that place is known, and the next one resumes exactly there.

# %%
for number, question in enumerate(("Which key?", "What was hidden?", "Say the key!")):
    other = engine.submit(prompt[:1700] + tokenizer.encode(question), max_new_tokens=2)
    list(other)
    turns.append((f"reader {number + 1}", other.hit_tokens, other.prefilled_tokens))
    print(f"{turns[-1][0]}: {other.hit_tokens} of {other.prompt_tokens} tokens hit; why no more: {other.miss_reason}")

turns = [("first question", long.hit_tokens, long.prefilled_tokens), *turns]
names, hits, computed = zip(*turns)
figure, axis = plt.subplots(figsize=(9, 3), layout="constrained")
axis.barh(names, hits, color="tab:green", label="hit")
axis.barh(names, computed, left=hits, color="tab:gray", label="computed")
axis.set(xlabel="tokens of the prompt")
axis.invert_yaxis()
axis.legend()
assert all(part < len(prompt) / 20 for part in computed[1:4]), (
    "of a question, and the last token of the answer before it"
)
assert hits[4] < 1700 and hits[5:] == (1700, 1700)

# %% [markdown]
# ## The same as without the cache
#
# An engine of the same sizes runs the same programs, and knows nothing yet.

# %%
cold = Engine(model, rows=3, chunk=512, decode_steps=2, pages=64, snapshots=32)
again = cold.submit(talk[: -len(answer.tokens)], max_new_tokens=8)
assert list(again) == answer.tokens and again.hit_tokens == 0
stats = engine.stats()
print(
    f"{stats.hit_tokens:,} of {stats.prompt_tokens:,} prompt tokens were hits; {stats.snapshots_kept} states are kept"
)
