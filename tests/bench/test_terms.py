"""`ring-jax plan --check` runs: every term of a tiny model is timed, on one rank and on two."""

import pytest

from ring_jax.bench import terms
from ring_jax.gdn import Heads
from ring_jax.models.qwen3_5 import Config
from ring_jax.plan.machine import Machine

TINY = Config("qwen3_5", 64, 32, 4, 2, 1, 16, Heads(2, 2, 8, 8), mlp_size=48, max_positions=4096)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_term_is_timed(ranks):
    found = list(terms.compare(TINY, "tiny", 128, Machine.of({"context": ranks}, "h100"), repeats=1))
    names = [term.name.split(" ")[0] for term in found]
    assert names == [
        "MLP",
        "weights",
        "norm",
        *["attention"] * 2,
        *["gated"] * 2,
        *["permute", "gather"] * (ranks > 1),
        *["tiny"] * 2,
    ]
    assert all(term.measured > 0 and term.predicted > 0 for term in found)
    assert f"{found[0].error:+.1%}" in str(found[0])
