"""Loops of the library say how far they are where somebody asked, after two seconds, and never under quiet."""

import io

import pytest

from ring_jax import _progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass: one for each look."""
    now = iter(range(1000))
    monkeypatch.setattr(_progress.time, "perf_counter", lambda: float(next(now)))


def run(items, capsys, **options):
    with _progress.shown(**options):
        found = list(_progress.track(items, "load", unit="B", size=lambda n: 1000 * n))
    return found, capsys.readouterr().err


def test_plain_lines(clock, capsys):
    found, text = run(range(1, 21), capsys)
    assert found == list(range(1, 21))
    lines = text.splitlines()
    assert lines[0] == "load: 3 k of 210 k B in 2 s, 1.5 k B/s"
    assert len(lines) == 3 and lines[-1].startswith("load: 210 k of 210 k B in 21 s")


def test_nothing_is_said(clock, capsys):
    assert run(range(20), capsys, quiet=True) == (list(range(20)), "")  # quiet
    assert run([1], capsys) == ([1], "")  # soon done
    assert list(_progress.track([1, 2], "load", unit="B")) == [1, 2]  # nobody asked
    assert capsys.readouterr() == ("", "")


def test_a_bar_in_a_terminal(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(_progress, "PATIENCE", 0.0)
    with _progress.shown():
        assert list(_progress.track(range(3), "load", unit="tokens")) == [0, 1, 2]
    assert "load" in terminal.getvalue() and "tokens/s" in terminal.getvalue()


def test_a_loop_that_fails_puts_the_bar_away(clock, capsys):
    with pytest.raises(KeyError), _progress.shown():
        for _ in _progress.track(range(5), "load", unit="B"):
            raise KeyError
    assert list(_progress.track([1], "x", unit="B")) == [1]
