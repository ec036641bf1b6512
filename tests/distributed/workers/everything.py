"""What a job of several processes does, each rank of it; `python everything.py FOLDER save|restore [generate]`.

The test compares what is printed, and what is saved, with the same in one process.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import ring_jax
from ring_jax.inference import generate
from ring_jax.models.qwen3_5 import Config, Qwen3_5, Sharding
from ring_jax.training import checkpoint
from tests.support.models import SMALLEST

LENGTH = 37
CONFIG = Config(family="qwen3_5", vocab_size=64, tie_embeddings=True, **SMALLEST)
PROMPTS = [list(range(30)), list(range(20, 57))]


def context_of(ranks):
    mesh = ring_jax.distributed.mesh(ranks, devices=jax.devices()[:ranks])
    return ring_jax.ContextParallel("context", layout="zigzag", mesh=mesh, strategy="ring")


def operands():
    random = np.random.default_rng(0)
    return [random.standard_normal((1, LENGTH, heads, 8), np.float32) for heads in (4, 2, 2, 4)]


def model_of(ranks, seed=0):
    sharding = Sharding(context_of(ranks), weights="context", gdn_strategy="state")
    return Qwen3_5(CONFIG, rngs=nnx.Rngs(seed), dtype=jnp.float32, sharding=sharding)


def optimizer_of(model):
    return nnx.Optimizer(model, optax.sgd(1e-3, momentum=0.9), wrt=nnx.Param)


def whole(tree):
    """Arrays that may lie over all processes, on every host."""
    mesh = ring_jax.distributed.mesh()
    copy = jax.jit(lambda x: x, out_shardings=jax.NamedSharding(mesh, jax.P()))
    return jax.tree.map(lambda x: np.asarray(copy(x)), tree)


def attention_error(context):
    """The largest difference of out and gradients from jax.nn's attention on this process alone."""
    *qkv, cotangent = operands()

    def ours(query, key, value):
        laid = [context.to_layout(x) for x in (query, key, value)]
        out = ring_jax.ring_attention(*laid, is_causal=True, seq_len=LENGTH, context=context)
        return context.from_layout(out, LENGTH)

    def theirs(query, key, value):
        return jax.nn.dot_product_attention(query, key, value, is_causal=True)

    def results(f):
        out, pull = jax.vjp(f, *qkv)
        return out, *pull(cotangent)

    got, want = (jax.jit(results, static_argnums=0)(f) for f in (ours, theirs))
    return max(np.abs(a - np.asarray(b)).max().item() for a, b in zip(whole(got), want, strict=True))


def main(folder, what, *more):
    ring_jax.distributed.initialize()
    ranks = jax.device_count()
    report = {"processes": jax.process_count(), "ranks": ranks, "error": attention_error(context_of(ranks))}
    steps, hf = Path(folder) / "steps", Path(folder) / "model"
    model = model_of(ranks, seed=0 if what == "save" else 1)
    optimizer = optimizer_of(model)
    if what == "save":
        checkpoint.save(steps, 1, model, optimizer, extra={"by": jax.process_count()})
        model.save_pretrained(hf)
    else:
        restored = checkpoint.restore(steps, model, optimizer)
        report |= {"step": restored.step, "by": restored.extra["by"]}
        checkpoint.save(steps, 2, model, optimizer, extra={"by": jax.process_count()})
        again = Qwen3_5.from_pretrained(hf, sharding=model.sharding)
        same = jax.tree.map(np.array_equal, *(whole(nnx.to_pure_dict(nnx.state(m, nnx.Param))) for m in (again, model)))
        report["same"] = all(jax.tree.leaves(same))
    held = jax.tree.leaves(nnx.state(model, nnx.Param))
    report["share"] = (
        sum(s.data.nbytes for x in held for s in x.addressable_shards)
        / sum(x.nbytes for x in held)
        / (len(jax.local_devices()))
    )
    if "generate" in more:
        report["tokens"] = generate(model, PROMPTS, max_new_tokens=3).tokens
    print("report", json.dumps(report), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
