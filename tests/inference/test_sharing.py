"""What engines of several processes say to each other, over a store that stands for jax's coordination service."""

import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax._src import distributed

from ring_jax.inference import sharing
from ring_jax.inference.pool import default_memory
from ring_jax.inference.requests import message
from ring_jax.inference.sampling import Sampling
from ring_jax.inference.sharing import EVERY, Sharing, processes_of


class Store(dict):
    """Of keys that appear later."""

    def __init__(self):
        self.changed = threading.Condition()

    def key_value_set_bytes(self, key, value):
        with self.changed:
            assert key not in self, "nothing is said twice"
            self[key] = value
            self.changed.notify_all()

    def key_value_delete(self, key):
        del self[key]

    def blocking_key_value_get_bytes(self, key, milliseconds):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self, milliseconds / 1000):
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: nobody said it")
            return self[key]


@pytest.fixture
def store(monkeypatch):
    found = Store()
    monkeypatch.setattr(distributed.global_state, "client", found)
    monkeypatch.setattr(sharing, "_ENGINES", sharing.Counter())
    monkeypatch.setattr(sharing, "_POLL", 20)
    return found


@pytest.fixture
def make(store, monkeypatch):
    def of(process, **options):
        monkeypatch.setattr(jax, "process_index", lambda: process)
        number = sharing._ENGINES[2, 5]
        made = Sharing(**{"first": True, "timeout": 0.1, "processes": (2, 5)} | options)
        sharing._ENGINES[2, 5] = number  # each process counts its own
        return made

    return of


def together(*calls):
    """What the calls return, or raise, at the same time."""
    results = [None] * len(calls)

    def run(n):
        try:
            results[n] = calls[n]()
        except RuntimeError as error:
            results[n] = error

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return results


def test_messages_of_the_first_reach_all(make, store):
    first, other = make(2), make(5)
    assert (first.leads, other.leads, first.enters_here, other.enters_here) == (True, False, True, False)
    for step in range(3 * EVERY):
        said = [{"what": "submit", "step": step}] if step % 10 == 0 else []
        assert together(lambda said=said: first.share(said), lambda: other.share([])) == [said, said]
        first.note(("prefill", step)), other.note(("prefill", step))
    assert len(store) < 2 * EVERY, "what all have read goes"


def test_whoever_decides_otherwise_is_told_before_the_next_step(make):
    first, other = make(2), make(5)
    together(lambda: first.share([]), lambda: other.share([]))
    first.note(("save", 1)), other.note(("save", 2))
    first.share([])
    with pytest.raises(RuntimeError, match="process 2 and process 5 have taken different decisions before step 2"):
        other.share([])


def test_a_reset_begins_anew(make):
    first, other = make(2), make(5)
    first.note("what died there")
    told = [{"what": "reset"}, {"what": "submit"}]
    assert together(lambda: first.share(told), lambda: other.share([])) == [told, told]
    assert together(lambda: first.share([]), lambda: other.share([])) == [[], []]


def test_others_wait_for_the_first_longer_than_for_a_digest(make):
    first, other = make(2), make(5)
    timer = threading.Timer(0.3, first.share, ([{"what": "cancel"}],))
    timer.start()
    assert other.share([]) == [{"what": "cancel"}]
    timer.join()


def test_the_first_leaves_once(make):
    first, other = make(2), make(5)
    assert together(lambda: first.share([]), lambda: other.share([])) == [[], []]
    first.note("a program that failed here alone")
    first.leave(), first.leave()
    assert other.share([]) == [{"what": "close"}]


def test_the_first_leaves_before_it_has_begun(make):
    first, other = make(2), make(5)
    first.leave()
    assert other.share([]) == [{"what": "close"}]


def test_the_same_calls_everywhere(make):
    """Texts are compared as they come in, before a program runs."""
    here, there = make(2, first=False), make(5, first=False)
    assert here.enters_here and there.enters_here
    same = [{"what": "submit", "tokens": [1, 2]}]
    assert together(lambda: here.share(same), lambda: there.share(same)) == [same, same]
    other = [{"what": "submit", "tokens": [1, 3]}]
    found = together(lambda: here.share(same), lambda: there.share(other))
    assert [str(error)[:30] for error in found] == ["process 5 and process 2 have t", "process 2 and process 5 have t"]


def test_who_does_not_come_is_named(make):
    here = make(2, first=False)
    with pytest.raises(RuntimeError, match=r"process 5 has not come to step 1 within 0\.1 s \(timeout\)"):
        here.share([{"what": "submit"}])


def test_the_least_of_all(make):
    here, there = make(2), make(5)
    assert together(lambda: here.least(7), lambda: there.least(5)) == [5, 5]


def test_without_a_service(monkeypatch):
    monkeypatch.setattr(distributed.global_state, "client", None)
    with pytest.raises(RuntimeError, match=r"call ring_jax\.distributed\.initialize"):
        Sharing(first=True, timeout=1.0, processes=(0, 1))


def test_devices_of_other_processes_are_not_asked_for_their_memory():
    def device(process, free):
        def stats():
            assert process == 0, "only its own process knows"
            return {"bytes_limit": 1000, "bytes_in_use": 900 - free}

        return SimpleNamespace(process_index=process, memory_stats=stats)

    mesh = SimpleNamespace(devices=np.asarray([[device(1, 0), device(0, 300)], [device(1, 0), device(0, 200)]]))
    model = SimpleNamespace(sharding=SimpleNamespace(resolve_mesh=lambda: mesh))
    assert default_memory(model) == 200 and processes_of(mesh) == (0, 1)


def test_a_message_is_plain_numbers():
    """NumPy's go through the checks of `submit` and would not go through JSON."""
    import json

    from ring_jax.inference.requests import make_request
    from tests.inference.checkpoint import CONFIG

    how = Sampling(np.float32(0.5), top_k=np.int64(4), top_p=np.float64(0.5))
    engine = SimpleNamespace(config=CONFIG)
    request = make_request(
        engine, 512, np.arange(4), np.int32(3), how, np.int64(5), np.arange(2), [np.int32(2)], np.int32(1), "s"
    )
    told = json.loads(json.dumps(message("submit", request)))
    assert told["how"] == [0.5, 4, 0.5] and told["tokens"] == [0, 1, 2, 3] and told["checkpoints"] == [2]
