"""Distances between arrays, and quick compiling."""

import functools

import jax
import numpy as np

# CPU code without LLVM's optimisation compiles five times as fast; the passes on the HLO, hence collectives, are the same.
_QUICK = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # later versions know this option no more
    _QUICK["xla_cpu_use_fusion_emitters"] = False
jit = functools.partial(jax.jit, compiler_options=_QUICK)


def relative(found, expected) -> float:
    """Relative L2 distance, in float64. Two exact zeros agree."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    assert np.isfinite(found).all()
    distance, norm = np.linalg.norm(found - expected), np.linalg.norm(expected)
    return 0.0 if distance == 0.0 else float(distance / norm) if norm else np.inf
