"""Compiles, and does not run, what one of RANKS ranks computes; prints one JSON line a program.

For as many emulated CPU devices in a process of its own: `python compile_ranks.py 64 [PROGRAM ...]`. Tokens a rank are the same
for any number of ranks, so whatever grows with them is the algorithm's, or a fault.
"""

import collections
import functools
import json
import re
import sys
import time

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ring_jax
from ring_jax.gdn import Heads
from ring_jax.models.qwen3_5 import Config, Qwen3_5, Sharding

TOKENS = 64  # of a rank
HEADS, KV_HEADS, SIZE = 4, 2, 16
KINDS = "collective-permute|all-gather|all-to-all|reduce-scatter|all-reduce"


def context_of(ranks, strategy):
    mesh = ring_jax.distributed.mesh(ranks)
    return ring_jax.ContextParallel("context", layout="zigzag", mesh=mesh, strategy=strategy)


def attention(ranks, strategy, gradient):
    context = context_of(ranks, strategy)
    spread = NamedSharding(context.mesh, P(None, "context"))
    shapes = ((1, TOKENS * ranks, n, SIZE) for n in (HEADS, KV_HEADS, KV_HEADS))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=spread) for shape in shapes]

    def forward(*qkv):
        return ring_jax.ring_attention(*qkv, is_causal=True, context=context)

    if not gradient:
        return jax.jit(forward).lower(*arrays)
    return jax.jit(jax.grad(lambda *qkv: jnp.sum(forward(*qkv) ** 2), argnums=(0, 1, 2))).lower(*arrays)


def model(ranks, strategy, gradient):
    """A hybrid model, one layer of each kind, its weights spread too; the loss of one sequence over all ranks."""
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "mlp_size": 64}
    layers = {"linear": Heads(2, 2, 16, 16), "layer_types": ("linear_attention", "full_attention")}
    config = Config(family="qwen3_5", vocab_size=256, tie_embeddings=True, max_positions=2**20, **sizes, **layers)
    sharding = Sharding(context_of(ranks, strategy), gdn_strategy="state")
    graph, state = nnx.split(Qwen3_5(config, rngs=None, dtype=jnp.float32, sharding=sharding))
    tokens = jax.ShapeDtypeStruct((1, TOKENS * ranks), jnp.int32)

    def loss(state, tokens):
        return nnx.merge(graph, state).loss(tokens)

    return jax.jit(jax.grad(loss) if gradient else loss).lower(state, tokens)


PROGRAMS = {
    "ring": (attention, "ring", False),
    "ring, gradient": (attention, "ring", True),
    "all_gather": (attention, "all_gather", False),
    "model, loss": (model, "ring", False),
    "model, gradient": (model, "ring", True),
}


def executed(text):
    """How often a rank executes each kind of collective, by the trip counts of the loops around it."""
    bodies = {
        m[1]: m[2] for m in re.finditer(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)
    }
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)[1]

    @functools.cache
    def count(name):
        found = collections.Counter()
        for line in bodies[name].splitlines():
            if kind := re.search(rf" ({KINDS})(?:-start)?\(", line):
                found[kind[1]] += 1
            trips = re.search(r"known_trip_count[^\d]*(\d+)", line)
            for inner in re.findall(r"(?:body|calls|to_apply|\w+_computation)=%?([\w.\-]+)", line):
                for kind, times in count(inner).items():
                    found[kind] += times * (int(trips[1]) if trips and "while(" in line else 1)
        return found

    return dict(sorted(count(entry).items()))


def measure(ranks, name):
    make, *options = PROGRAMS[name]
    begin = time.perf_counter()
    lowered = make(ranks, *options)
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    text = compiled.as_text()
    memory = compiled.memory_analysis()
    return {
        "program": name,
        "ranks": ranks,
        "trace": round(traced - begin, 2),
        "compile": round(done - traced, 2),
        "collectives": executed(text),
        "temporaries": memory.temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "instructions": text.count(" = "),
    }


if __name__ == "__main__":
    count = int(sys.argv[1])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    for program in sys.argv[2:] or PROGRAMS:
        print(json.dumps(measure(count, program)), flush=True)
