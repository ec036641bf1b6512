"""Devices, strictness and skips for the whole suite.

Tests run on eight emulated CPU devices, chosen here because XLA reads the setting only once, when jax first touches a
device. A run that selects GPU tests (``-m gpu``, ``-m multi_gpu``) leaves the choice of platform to jax instead.

Tests compile far more than they compute, so the CPU's code generator runs unoptimised, which halves the suite's time; without its
fusion emitters, where it still can, a quarter more. What programs send is read of the same HLO that users have, what they hold of
programs compiled with the emitters (`tests/support/hlo.py`). CI runs the smoke tests and the demo as users have them, optimised.

There is no persistent compilation cache on purpose: the suite reads memory analyses, collectives and compile times
off fresh executables, and a cached one answers for a different compilation.
"""

import itertools
import os
import pathlib
import re
from importlib.metadata import version

import hypothesis
import pytest

# Compiling takes longer than hypothesis' deadline. CI repeats itself: a red run there can be run again.
hypothesis.settings.register_profile("ring_jax", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("ring_jax")


_QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": "true"}
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # later ones know no other way
    _QUICK_TO_COMPILE["xla_cpu_use_fusion_emitters"] = "false"


def _selects_gpu(mark_expression: str) -> bool:
    return re.search(r"(?<!not )\b(multi_)?gpu\b", mark_expression) is not None


def pytest_configure(config: pytest.Config) -> None:
    given = os.environ.get("XLA_FLAGS", "")
    flags: dict[str, object] = {"xla_force_host_platform_device_count": 8}
    if not _selects_gpu(config.option.markexpr):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        if "xla_backend_optimization_level" not in given:
            flags |= _QUICK_TO_COMPILE
    missing = [f"--{flag}={value}" for flag, value in flags.items() if flag not in given]
    os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()

    # Before the package is imported by anybody.
    from tests.support import shapes

    shapes.install()

    import jax

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Workers of `-n auto`, the default. Each wants some GiB, so not one on every core of a large machine; tests on GPUs
    run in this process, because jax takes most of a GPU's memory for each (`-n` with a number overrules)."""
    if _selects_gpu(config.option.markexpr):
        return 0
    return min(os.cpu_count() or 1, 8)


def pytest_runtest_setup(item: pytest.Item) -> None:
    needed = 2 if item.get_closest_marker("multi_gpu") else 1 if item.get_closest_marker("gpu") else 0
    if needed:
        found = _gpu_count()
        if found < needed:
            pytest.skip(f"needs {needed} CUDA GPU(s), found {found}")


_finished = itertools.count(1)


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Forgets compiled programs before they take more memory mappings than Linux gives a process (65530), which ends it in LLVM. A large
    test takes some 700."""
    maps = pathlib.Path("/proc/self/maps")
    if next(_finished) % 16 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > 40_000:
        import jax

        jax.clear_caches()


def _gpu_count() -> int:
    import jax

    try:
        return len(jax.devices("gpu"))
    except RuntimeError:
        return 0


@pytest.fixture(scope="session")
def cpu_devices():
    """The eight emulated CPU devices."""
    import jax

    devices = jax.devices("cpu")
    assert len(devices) >= 8, f"expected 8 emulated CPU devices, found {len(devices)}"
    return devices[:8]
