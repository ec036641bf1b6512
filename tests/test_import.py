"""Importing ring_jax touches no device and no global config."""

import pathlib
import re
import socket
import subprocess
import sys
import textwrap


def run(code, *options):
    return subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def assert_runs(code, *options):
    result = run(code, *options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_distributed_start_up_still_works_after_import():
    """`jax.distributed.initialize` refuses once a backend exists."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert_runs(
        f"""
        import os
        os.environ["JAX_PLATFORMS"] = "cpu"
        import ring_jax, ring_jax.nn, ring_jax.cli
        import jax
        jax.distributed.initialize("127.0.0.1:{port}", num_processes=1, process_id=0)
        assert jax.process_count() == 1 and jax.distributed.is_initialized()
        jax.distributed.shutdown()
        """
    )


def test_import_changes_no_config_and_no_environment():
    assert_runs(
        """
        import os, jax
        def settings():
            return dict(jax.config.values), dict(os.environ)
        before = settings()
        import ring_jax, ring_jax.nn, ring_jax.context, ring_jax.flash
        assert settings() == before
        from jax._src import xla_bridge
        assert not xla_bridge.backends_are_initialized()
        """
    )


def test_every_module_imports():
    assert_runs(
        """
        import importlib, pkgutil, ring_jax
        names = [m.name for m in pkgutil.walk_packages(ring_jax.__path__, "ring_jax.") if m.name != "ring_jax.__main__"]
        assert len(names) > 20
        for name in names:
            importlib.import_module(name)
        """
    )


def test_public_names_are_documented_and_there():
    """`import ring_jax` reaches all of them, and imports no Flax before it is asked for something that needs it."""
    page = (pathlib.Path(__file__).parents[1] / "docs" / "public_api.md").read_text()
    table = "".join(
        line.split("|")[1] for line in page.splitlines() if line.startswith("| `") and "ring_jax." not in line
    )
    documented = set(re.findall(r"`(\w+)`", table))
    names = assert_runs(
        """
        import sys, ring_jax
        assert "flax" not in sys.modules
        assert set(ring_jax.__all__) <= set(dir(ring_jax))
        for name in ring_jax.__all__:
            getattr(ring_jax, name)
        print(*ring_jax.__all__)
        """
    )
    assert set(names.split()) == documented
