"""XLA:CPU of jax 0.10.2 ends the process in a sum of a product, where the arrays have an axis of size one.

    python cpu_product_sum.py        (no GPU needed; each case runs in a process of its own, exit status 1 where one ends)

The sum over an inner axis and the product before it become one fusion of kind `__ynn_fusion`, which crashes when it runs. With
XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= there is no such fusion, and the result is right. Under `vmap(grad(...))`
such sums arise from any product with a broadcast operand.

A second fault of the same fusions ends the process at compilation: a product of arrays of eight axes (six of them batch),
"Check failed: b_rank < YNN_MAX_TENSOR_RANK (8 vs. 8)".

Seen on CPUs: the sum on jax 0.10.2 (not on 0.11.2 and 0.12.0.1); eight axes on 0.10.2, 0.11.2 and 0.12.0.1.
"""

import os
import subprocess
import sys

CASES = {
    "sum(a * b, axis=4) of [2, 1, 2, 2, 2, 16, 16]": ("product_sum", (2, 1, 2, 2, 2, 16, 16)),
    "sum(a * b, axis=4) of [2, 2, 2, 2, 2, 16, 16]": ("product_sum", (2, 2, 2, 2, 2, 16, 16)),
    "a @ b^T of [2, 2, 2, 2, 2, 16, 16]": ("product", (2, 2, 2, 2, 2, 16, 16)),
    "a @ b^T of [2, 2, 2, 2, 2, 2, 16, 16]": ("product", (2, 2, 2, 2, 2, 2, 16, 16)),
}


def one(kind: str, shape: tuple[int, ...]) -> None:
    import jax
    import numpy as np

    a, b = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    function = {
        "product_sum": lambda a, b: (a * b).sum(axis=4),
        "product": lambda a, b: a @ b.swapaxes(-1, -2),
    }[kind]
    np.testing.assert_allclose(jax.jit(function)(a, b), function(a, b), rtol=1e-4, atol=1e-4)


def main() -> int:
    import jax

    print("jax", jax.__version__, "Python", sys.version.split()[0], os.environ.get("XLA_FLAGS", ""))
    ended = 0
    for name in CASES:
        found = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=False)
        ended += found.returncode != 0
        reason = next((line.split("] ")[-1] for line in found.stderr.splitlines() if "Check failed" in line), "")
        print(f"{name}: {'right' if found.returncode == 0 else f'exit status {found.returncode} {reason}   <-- wrong'}")
    return int(ended > 0)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main() if len(sys.argv) == 1 else one(*CASES[sys.argv[1]]))
