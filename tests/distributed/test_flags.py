"""Flags are data, and set only when asked."""

import pytest

from ring_jax.distributed import Flag, recommended_flags, use_flags
from ring_jax.distributed.flags import FLAGS

# What would switch NVLink multicast on.
MULTICAST = ("nvls", "multicast", "user_buffers", "symmetric", "multimem")


@pytest.mark.parametrize("flag", FLAGS, ids=str)
def test_each_has_a_reason_and_none_asks_for_multicast(flag):
    assert len(flag.reason) > 40 and flag.when in ("one process", "several processes", "always")
    if any(word in str(flag).lower() for word in MULTICAST):
        assert flag.value == "0"


def test_set_only_where_nothing_is_set():
    flags = (Flag("--xla_a", "1", "always", ""), Flag("--xla_ab", "2", "always", ""), Flag("N", "3", "always", ""))
    env = {"XLA_FLAGS": "--xla_ab=7", "HOME": "x"}
    assert [f.name for f in use_flags(flags, env)] == ["--xla_a", "N"]
    assert env == {"XLA_FLAGS": "--xla_ab=7 --xla_a=1", "N": "3", "HOME": "x"}
    assert use_flags(flags, env) == []


def test_peer_copies_are_for_one_process():
    assert "--xla_gpu_collective_permute_mode" in [f.name for f in recommended_flags()]
    assert "--xla_gpu_collective_permute_mode" not in [f.name for f in recommended_flags(2)]
