"""What `ring-jax doctor` says of the layers that are no attention: the gated delta rule and the experts."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

DTYPES = ("float32", "bfloat16")


def choices() -> list[str]:
    """What implementation=None picks here, a line each."""
    import jax

    from ring_jax.gdn import backends as rules
    from ring_jax.moe import backends as experts

    def struct(dtype: str, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    lines = []
    for dtype in DTYPES[::-1]:
        heads, wide = struct(dtype, 1, 64, 2, 128), struct(dtype, 1, 64, 4, 128)
        found = {"gated delta rule": (rules, (heads, heads, wide))}
        expert = struct(dtype, 64, 256), struct(dtype, 8, 256, 2, 64), struct(dtype, 8, 64, 256)
        found["experts"] = (experts, expert)
        for what, (table, operands) in found.items():
            chosen = table.select(None, *operands).name
            reason = table.BACKENDS["mosaic"].unsupported_reason(*operands)
            lines.append(f"{dtype}, {what}: {chosen}" + (f" (mosaic {reason})" if reason else ""))
    return lines


def rules(seq_len: int) -> tuple[Iterable[str], Callable[[str, str], list[Any]], list[Any]]:
    """Names of what computes the gated delta rule, the results of one by name and dtype, and what they should be."""
    import jax
    import jax.numpy as jnp

    from ring_jax.gdn import gated_delta_rule
    from ring_jax.gdn.backends import BACKENDS

    random = np.random.default_rng(1)
    q, k = random.standard_normal((2, 1, seq_len, 2, 64))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    arrays = [_exact(x) for x in (q, k, random.standard_normal((1, seq_len, 4, 64)))]
    arrays += [
        jnp.asarray(x, jnp.float32)
        for x in (-random.exponential(size=(1, seq_len, 4)), random.uniform(size=(1, seq_len, 4)))
    ]

    def run(name: str, dtype: str) -> list[Any]:
        cast = (x.astype(dtype) if i < 3 else x for i, x in enumerate(arrays))
        return list(jax.jit(lambda *x: gated_delta_rule(*x, implementation=name))(*cast))

    return BACKENDS, run, run("reference", "float32")


def experts(tokens: int) -> tuple[Iterable[str], Callable[[str, str], list[Any]], list[Any]]:
    """The same of the experts' products, all experts for each token: so no rounding decides which."""
    import jax

    from ring_jax.moe import MoEWeights, moe
    from ring_jax.moe.backends import BACKENDS
    from ring_jax.moe.reference import reference

    random = np.random.default_rng(2)
    width, features, count = 128, 64, 4
    x, router = (_exact(random.standard_normal(shape) / 4) for shape in ((tokens, width), (width, count)))
    gate_up, down = (
        _exact(random.standard_normal(s) / 8) for s in ((count, width, 2, features), (count, features, width))
    )

    def run(name: Any, dtype: str) -> list[Any]:
        cast = [w.astype(dtype) for w in (x, router, gate_up, down)]
        call = lambda x, *weights: moe(x, MoEWeights(*weights), top_k=count, implementation=name)[0]  # noqa: E731
        return [jax.jit(call)(*cast)]

    with jax.default_matmul_precision("highest"):
        want = [jax.jit(lambda *a: reference(a[0], MoEWeights(*a[1:]), top_k=count))(x, router, gate_up, down)]
    return BACKENDS, run, want


def _exact(x: Any) -> Any:
    """As values that bfloat16 holds exactly, so that every dtype starts from the same input."""
    import jax.numpy as jnp

    return jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)
