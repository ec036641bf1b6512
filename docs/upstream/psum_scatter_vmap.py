"""`jax.lax.psum_scatter(tiled=False)` under `jax.vmap` loses track of a mapped axis that lies behind the scattered one.

    python psum_scatter_vmap.py        (no GPU needed; exit status 1 where the fault is there)

The scattered axis vanishes, so a mapped axis behind it moves one place to the front; the batching rule
(`_reduce_scatter_batcher` in jax/_src/lax/parallel.py) moves it one place to the back instead, `d += 1` for `d -= 1`. What
follows maps over another axis: the values are wrong without a word where its size fits, and tracing fails where it does not.
`all_gather(tiled=False)` is transposed to this primitive, so `vmap(grad(...))` through it is wrong, too. The tiled forms are right.

Seen on jax 0.10.2, 0.11.2 and 0.12.0.1, on CPUs.
"""

import functools
import itertools
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import jax
import numpy as np
from jax import lax

RANKS, MAPPED = 4, 3


def scattered(x, tiled):
    share = lax.psum_scatter(x, "r", scatter_dimension=0, tiled=tiled)
    return share[0] if tiled else share


def pulled_through_gather(cotangent, tiled):
    """The gradient of an all-gather of arrays [...], given the cotangent [RANKS, ...] of what was gathered."""
    gather = lambda x: lax.all_gather(x[None] if tiled else x, "r", axis=0, tiled=tiled)  # noqa: E731
    return jax.vjp(gather, cotangent[0])[1](cotangent)[0]


def error(one, x) -> float:
    """Of `one`, mapped over the second axis of each rank's own array, against one call for each of its entries."""
    mesh = jax.make_mesh((RANKS,), ("r",), axis_types=(jax.sharding.AxisType.Auto,))

    def run(function, x):
        local = lambda x: function(x[0])[None]  # noqa: E731
        return np.asarray(jax.jit(jax.shard_map(local, mesh=mesh, in_specs=jax.P("r"), out_specs=jax.P("r")))(x))

    expected = np.stack([run(one, x[:, :, i]) for i in range(x.shape[2])], axis=1)
    return float(np.abs(run(jax.vmap(one, in_axes=1, out_axes=0), x) - expected).max())


def main() -> int:
    print("jax", jax.__version__, "Python", sys.version.split()[0])
    random, faults = np.random.default_rng(0), 0
    for tiled in (True, False):
        for function, shape in itertools.product((scattered, pulled_through_gather), ((MAPPED, MAPPED), (5,))):
            x = random.normal(size=(RANKS, RANKS, MAPPED, *shape)).astype(np.float32)
            try:
                wrong = error(functools.partial(function, tiled=tiled), x)
                verdict, fault = f"largest error {wrong:.2g}", wrong > 1e-4
            except Exception as problem:  # what it raises depends on what the wrong axis meets
                verdict, fault = f"{type(problem).__name__}: {str(problem).splitlines()[0]}", True
            faults += fault
            print(
                f"vmap of {function.__name__}(tiled={tiled}), arrays {x.shape[1:]}: {verdict}{'   <-- wrong' if fault else ''}"
            )
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
