"""The engine over several processes: they decide alike, say so to each other, and write what one process writes."""

import pytest

from ring_jax.inference import Engine
from tests.distributed.test_processes import WORKERS, launched, reports
from tests.distributed.workers import serving


@pytest.mark.parametrize(
    ("processes", "each"),
    [(2, 1), pytest.param(4, 1, marks=pytest.mark.slow), pytest.param(2, 2, marks=pytest.mark.slow)],
)
def test_processes_decide_alike(processes, each):
    found = sorted(reports(launched(processes, each, WORKERS / "serving.py")), key=lambda report: "refused" in report)
    here = Engine(serving.model_of(1), **serving.pool(1), **serving.SIZES)
    tokens, hits = serving.texts(here)
    assert len(found) == processes and hits[0] > 0 == hits[1]
    assert (found[0]["first"], found[0]["hits"]) == (tokens, hits)
    for report in found:
        assert report["all"] == tokens
        assert report["digest"] == found[0]["digest"] and report["stats"] == found[0]["stats"]
        assert report["stats"]["new_tokens"] == 40, "of one text after the reset"
        assert report["geometry"] == found[0]["geometry"]
        assert "different decisions" in report["differ"] and "do all processes make the same calls" in report["differ"]
    assert [report.get("refused", "")[:30] for report in found] == [
        "",
        *["texts enter on the first proces"[:30]] * (processes - 1),
    ]
