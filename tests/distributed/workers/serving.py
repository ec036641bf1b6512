"""An engine over all processes: texts that enter on the first and reach all, then the same calls on all, then calls that differ.

Each rank prints what it has seen; the test compares it with the other ranks and with one process.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
from flax import nnx

import ring_jax
from ring_jax.inference import Engine, Sampling
from ring_jax.models.qwen3_5 import Config, Qwen3_5, Sharding
from tests.support.models import SMALLEST

CONFIG = Config(family="qwen3_5", vocab_size=64, tie_embeddings=True, **SMALLEST)
SHORT, LONG = list(range(30)), list(range(20, 57))
WARM = Sampling(1.5, top_k=20, top_p=0.9)
SIZES = {"rows": 2, "chunk": 64, "decode_steps": 2, "timeout": 60.0}


def model_of(ranks):
    mesh = ring_jax.distributed.mesh(ranks, devices=jax.devices()[:ranks])
    context = ring_jax.ContextParallel("context", layout="zigzag", mesh=mesh)
    return Qwen3_5(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32, sharding=Sharding(context, weights="context"))


def pool(ranks):
    """Pages for one of two texts at their end: the younger has to wait, and goes on from a snapshot."""
    return {"page": 16 // ranks, "pages": 7, "snapshots": 6}


def texts(engine):
    """Tokens of a cold text, a neighbour that is drawn, one that is cancelled at once, one that hits, and one after a reset."""
    options = {"max_new_tokens": 40, "stop_ids": ()}
    first, drawn = engine.submit(LONG, **options), engine.submit(SHORT, sampling=WARM, seed=7, **options)
    gone = engine.submit(SHORT, **options)
    gone.cancel()
    engine.run()
    assert gone.finish_reason == "cancelled" and engine.stats().preemptions > 0
    hit = engine.submit(SHORT, sampling=WARM, seed=7, **options)
    engine.run()
    hits = hit.hit_tokens
    engine.reset()
    cold = engine.submit(LONG, **options)
    engine.run()
    cold.cancel()  # has ended: nothing to do
    return [request.tokens for request in (first, drawn, hit, cold)], [hits, cold.hit_tokens]


def main():
    ring_jax.distributed.initialize()
    ranks = jax.device_count()
    model = model_of(ranks)
    report = {}
    engine = Engine(model, entry="first", **pool(ranks), **SIZES)
    if jax.process_index():
        engine.follow()
        try:
            engine.submit(SHORT)
        except RuntimeError as error:
            report["refused"] = str(error)
    else:
        report["first"], report["hits"] = texts(engine)
        engine.close()
    stats = dataclasses.asdict(engine.stats())
    report["stats"] = {name: n for name, n in stats.items() if not name.startswith("seconds")}
    report["digest"] = engine._sharing._digest.hexdigest()

    engine = Engine(model, **pool(ranks), **SIZES)
    report["all"], _ = texts(engine)
    engine.submit([1 + jax.process_index(), 2, 3], max_new_tokens=2)
    try:
        engine.run()
    except RuntimeError as error:
        report["differ"] = str(error)
    report["geometry"] = str(Engine(model, rows=2).geometry)

    engine = Engine(model, entry="first", **pool(ranks), **SIZES)  # the first process ends without a word
    if jax.process_index():
        engine.follow()
    print("report", json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
