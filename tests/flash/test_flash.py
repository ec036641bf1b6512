"""One harness for all backends that run anywhere: float64 oracle, gradients, LSE, carries, awkward shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ring_jax
from ring_jax.flash import backends, merge, xla
from ring_jax.flash.api import rounded_attention
from ring_jax.flash.kv import pack
from tests.support import oracle
from tests.support.hlo import memory
from tests.support.masks import cases

IMPLEMENTATIONS = ["reference", "xla"]
# N, K, H, Hv, soft cap, sinks
VARIANTS = {
    "MHA": (3, 3, 8, 8, None, False),
    "GQA, capped": (4, 2, 8, 8, 2.0, False),
    "MQA, wide values, sinks": (4, 1, 8, 12, None, True),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(xla, "_BLOCK_Q", 16)
    monkeypatch.setattr(xla, "_BLOCK_K", 8)


def inputs(B, T, S, N, K, H, Hv, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = {"query": (B, T, N, H), "key": (B, S, K, H), "value": (B, S, K, Hv), "dout": (B, T, N, Hv)}
    x = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    return x | {"dlse": rng.normal(size=(B, T, N)).astype(np.float32), "sinks": rng.normal(size=N).astype(np.float32)}


@functools.partial(jax.jit, static_argnames=("implementation", "scale", "cap", "sinks", "cuts"))
def run_jit(x, start, end, *, implementation, scale, cap, sinks, cuts):
    N, Hv = x["query"].shape[2], x["value"].shape[3]

    def f(query, key, value, sink):
        rows = query.shape[:3]
        carry = (jnp.zeros((*rows, Hv), jnp.float32), jnp.broadcast_to(sink, rows)) if sinks else None
        for low, high in zip((0, *cuts), (*cuts, key.shape[1]), strict=True):
            carry = ring_jax.flash_attention(
                query, key[:, low:high], value[:, low:high], jnp.clip(start, low, high) - low, jnp.clip(end, low, high) - low,
                scale=scale, logits_soft_cap=cap, carry=carry, implementation=implementation,
            )  # fmt: skip
        return carry

    (out, lse), pull = jax.vjp(f, x["query"], x["key"], x["value"], x["sinks"])
    assert out.dtype == lse.dtype == jnp.float32 and lse.shape == (*out.shape[:2], N)
    dq, dk, dv, dsinks = pull((x["dout"].astype(out.dtype), x["dlse"]))
    result = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    return result | ({"dsinks": dsinks} if sinks else {})


def run(implementation, x, start, end, *, scale=0.3, cap=None, sinks=False, cuts=()):
    """out, lse and all gradients; `cuts` splits the keys into blocks that are resumed one after the other."""
    return run_jit(x, start, end, implementation=implementation, scale=scale, cap=cap, sinks=sinks, cuts=cuts)


def expected(x, start, end, *, scale=0.3, cap=None, sinks=False):
    S = x["key"].shape[1]
    s = np.arange(S)
    visible = (s >= np.asarray(start)[..., None]) & (s < np.asarray(end)[..., None])
    visible = np.broadcast_to(visible, (*x["query"].shape[:2], S))
    return oracle.attention(
        x["query"], x["key"], x["value"], visible, scale=scale, cap=cap, sinks=x["sinks"] if sinks else None,
        dout=x["dout"], dlse=np.where(visible.any(-1)[..., None], x["dlse"], 0) if not sinks else x["dlse"],
    )  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_mask_forward_and_gradients(implementation, variant):
    N, K, H, Hv, cap, sinks = VARIANTS[variant]
    x = inputs(2, 45, 45, N, K, H, Hv)
    for name, (mask, _) in cases().items():
        start, end = (np.broadcast_to(b, (2, 45)) for b in mask.interval(q_len=45, kv_len=45))
        got = run(implementation, x, start, end, cap=cap, sinks=sinks)
        try:
            oracle.assert_close(got, expected(x, start, end, cap=cap, sinks=sinks), 2e-6)
        except AssertionError as error:
            raise AssertionError(f"mask {name}: {error}") from None


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("T, S, cuts", [(1, 1, ()), (17, 70, (3,)), (33, 29, (8, 9, 20))])
def test_resuming_block_by_block_equals_one_call(implementation, T, S, cuts):
    x = inputs(2, T, S, 4, 2, 8, 8, seed=1)
    rng = np.random.default_rng(2)
    start, end = (np.sort(rng.integers(0, S + 1, (2, T)), axis=1).astype(np.int32) for _ in range(2))
    end = np.maximum(start, end)
    want = expected(x, start, end, sinks=True)
    oracle.assert_close(run(implementation, x, start, end, cuts=cuts, sinks=True), want, 2e-6)
    want = expected(x, start, end)
    oracle.assert_close(run(implementation, x, start, end, cuts=cuts), want, 2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_as_good_as_the_materialised_form(implementation, dtype):
    x = {name: jnp.asarray(v) for name, v in inputs(1, 200, 200, 4, 2, 16, 16, seed=3).items()}
    x = {name: v.astype(dtype) if name not in ("dlse", "sinks") else v for name, v in x.items()}
    start, end = (np.broadcast_to(b, (1, 200)) for b in ring_jax.causal().interval(q_len=200, kv_len=200))
    want = expected({k: np.asarray(v, np.float64) for k, v in x.items()}, start, end)
    got = run(implementation, x, start, end)
    base = run("reference", x, start, end)
    for name in want:
        ours, theirs = (oracle.relative(r[name].astype(jnp.float32), want[name]) for r in (got, base))
        assert ours <= 2 * theirs, f"{name}: {ours} against {theirs}"


def test_gradients_of_merged_half_precision_blocks_cancel():
    """Cotangents of float32 partials are rounded for the kernel's products; delta must be that of the rounded ones."""
    x = {name: jnp.asarray(v) for name, v in inputs(1, 64, 64, 2, 2, 16, 16, seed=5).items()}
    q, k, v = (x[n].astype(jnp.bfloat16) for n in ("query", "key", "value"))
    v = v + jnp.bfloat16(8)
    start, cut, end = (jnp.full((1, 64), n, jnp.int32) for n in (0, 32, 64))

    def attend(implementation, q, k, v):
        spans = ((start, cut), (cut, end))
        parts = [ring_jax.flash_attention(q, k, v, a, b, implementation=implementation) for a, b in spans]
        return ring_jax.merge_partials(*parts[0], *parts[1])[0]

    def gradients(implementation, *args):
        return jax.jit(jax.grad(lambda *a: jnp.sum(attend(implementation, *a) * x["dout"]), argnums=(0, 1, 2)))(*args)

    want = gradients("reference", *(a.astype(jnp.float32) for a in (q, k, v)))
    for name, got, exact in zip("qkv", gradients("xla", q, k, v), want, strict=True):
        assert oracle.relative(got.astype(jnp.float32), exact) < 1e-2, name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float64_stays_float64(implementation):
    with jax.enable_x64(True):
        x = inputs(1, 20, 20, 2, 1, 8, 8, dtype=np.float64)
        start, end = np.zeros((1, 20), np.int32), np.arange(1, 21, dtype=np.int32)[None]
        out, lse = ring_jax.flash_attention(
            *(jnp.asarray(x[n]) for n in ("query", "key", "value")),
            start,
            end,
            scale=0.3,
            implementation=implementation,
        )
        assert out.dtype == lse.dtype == jnp.float64
        assert oracle.relative(out, expected(x, start, end)["out"]) < 1e-14


def test_xla_skips_tiles_that_no_row_sees():
    # Keys outside every row's interval are poisoned: a tile that were read would spread NaN.
    x = inputs(1, 32, 64, 2, 2, 8, 8)
    start, end = np.full((1, 32), 24, np.int32), np.full((1, 32), 40, np.int32)
    clean = run("xla", x, start, end)
    for name in ("key", "value"):
        x[name][:, :24] = np.nan
        x[name][:, 40:] = np.nan
    poisoned = run("xla", x, start, end)
    for name in ("out", "lse", "dq"):
        np.testing.assert_array_equal(clean[name], poisoned[name])


def test_merge_of_two_empty_partials_has_finite_gradients():
    out, lse = jnp.zeros((1, 2, 1, 4)), jnp.full((1, 2, 1), -jnp.inf)
    merged = merge.merge_partials(out, lse, out, lse)
    assert jnp.all(merged[0] == 0) and jnp.all(jnp.isneginf(merged[1]))

    def loss(a, b, c, d):
        out, lse = merge.merge_partials(a, b, c, d)
        return out.sum() + jnp.where(jnp.isneginf(lse), 0, lse).sum()

    gradients = jax.grad(loss, argnums=(0, 1, 2, 3))(out, lse, out, lse)
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in gradients)


def test_merge_equals_attention_over_the_union():
    x = inputs(1, 9, 20, 2, 2, 8, 8)
    zero, cut, end = (np.full((1, 9), n, np.int32) for n in (0, 13, 20))
    q, k, v = (jnp.asarray(x[n]) for n in ("query", "key", "value"))
    parts = [ring_jax.flash_attention(q, k, v, a, b) for a, b in ((zero, cut), (cut, end))]
    whole = ring_jax.flash_attention(q, k, v, zero, end)
    for got, want in zip(ring_jax.merge_partials(*parts[0], *parts[1]), whole, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_keys_and_no_queries(implementation):
    q, kv = jnp.ones((1, 3, 2, 4)), jnp.ones((1, 0, 2, 4))
    zero = jnp.zeros((1, 3), jnp.int32)
    out, lse = ring_jax.flash_attention(q, kv, kv, zero, zero, implementation=implementation)
    assert jnp.all(out == 0) and jnp.all(jnp.isneginf(lse))
    out, lse = ring_jax.flash_attention(q[:, :0], q, q, zero[:, :0], zero[:, :0], implementation=implementation)
    assert out.shape == (1, 0, 2, 4) and lse.shape == (1, 0, 2)


def test_named_implementation_is_the_one_that_runs(monkeypatch):
    ran = []
    for name in IMPLEMENTATIONS:
        backend = backends.BACKENDS[name]
        spy = lambda *a, _f=backend.forward, _n=name, **k: (ran.append(_n), _f(*a, **k))[1]  # noqa: E731
        monkeypatch.setitem(backends.BACKENDS, name, backends.Backend(name, spy, backend.backward))
    x = jnp.ones((1, 4, 2, 8))
    bounds = jnp.zeros((1, 4), jnp.int32), jnp.full((1, 4), 4, jnp.int32)
    for name in IMPLEMENTATIONS:
        ring_jax.flash_attention(x, x, x, *bounds, implementation=name)
    assert ran == IMPLEMENTATIONS


def test_gradient_memory_is_not_quadratic():
    def temp(S):
        x = jax.ShapeDtypeStruct((1, S, 2, 32), jnp.float32)
        bounds = jax.ShapeDtypeStruct((1, S), jnp.int32)
        loss = lambda q, k, v, s, e: ring_jax.flash_attention(q, k, v, s, e, implementation="xla")[0].sum()  # noqa: E731
        lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x, bounds, bounds)
        return memory(lowered).temp_size_in_bytes

    assert temp(8192) < 2.5 * temp(4096)


X = jnp.ones((1, 4, 2, 8))
I = jnp.zeros((1, 4), jnp.int32)  # noqa: E741


@pytest.mark.parametrize(
    "args, kwargs, error, message",
    [
        (
            (X[0], X, X, I, I),
            {},
            ValueError,
            r"query must have 4 axes \[B, T, N, H\], got shape \(4, 2, 8\)",
        ),
        ((X, X.astype(jnp.bfloat16), X, I, I), {}, ValueError, "must share one dtype, got float32, bfloat16"),
        ((X.astype(jnp.int32), X, X, I, I), {}, ValueError, "query must be floating point, got int32"),
        (
            (X, X[:, :, :, :4], X, I, I),
            {},
            ValueError,
            r"key must have shape \[B=1, S=4, K=2, H=8\], got \(1, 4, 2, 4\)",
        ),
        ((jnp.ones((1, 4, 3, 8)), X, X, I, I), {}, ValueError, "3 query heads cannot share 2 key-value heads"),
        ((X, X, X, I.astype(jnp.float32), I), {}, ValueError, "key_start must be integers, got float32"),
        ((X, X, X, I, I[:, :2]), {}, ValueError, r"key_end must have shape \(1, 4\)"),
        (
            (X, X, X, I, jnp.array([1, 2, 0, 0])),
            {},
            ValueError,
            "must not decrease .* row 2 has less than row 1: order",
        ),
        (
            (X, X, X, I, I),
            {"implementation": "cuda"},
            ValueError,
            "unknown implementation 'cuda': expected one of",
        ),
        ((X, X, X, I, I), {"logits_soft_cap": -1.0}, ValueError, "must be finite and > 0, got -1.0"),
        ((X, X, X, I, I), {"scale": jnp.ones(2)}, TypeError, "scale must be one number"),
        ((X, X, X, I, I), {"carry": (X, I)}, ValueError, r"carry\[1\] must be floating point"),
    ],
)
def test_errors(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        ring_jax.flash_attention(*args, **kwargs)


def test_packed_forms():
    assert pack(X, X).shape == (2, 1, 4, 2, 8)
    assert pack(X, X[..., :4]).shape == (1, 4, 2, 12)


def test_eager_calls_share_one_program(caplog):
    """In a notebook: an eager call used to compile at every call, operation by operation."""
    bounds = jnp.zeros((1, 24), jnp.int32), jnp.arange(1, 25)[None]

    def call(seed):
        query, key, value = jax.random.normal(jax.random.key(seed), (3, 1, 24, 2, 8))
        return jax.grad(lambda query: ring_jax.flash_attention(query, key, value, *bounds)[0].sum())(query)

    with jax.log_compiles():
        call(0)
        assert "Compiling" in caplog.text
        caplog.clear()
        call(1)
        assert "Compiling" not in caplog.text


def test_rounded_attention_rounds_what_the_call_gives():
    """Bit by bit forward, resumed or not; the gradient is that of the rounded out: delta is in float32, dO never was."""
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 24, 2, 16), jnp.bfloat16) for i in range(3))
    end = jnp.arange(1, 25, dtype=jnp.int32)[None]
    bounds = jnp.zeros_like(end), end
    for carry in (None, ring_jax.flash_attention(q, v, k, *bounds)):
        wide = ring_jax.flash_attention(q, k, v, *bounds, carry=carry)[0]
        found, pull = jax.vjp(lambda *x, carry=carry: rounded_attention(*x, *bounds, carry=carry), q, k, v)
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found, wide.astype(jnp.bfloat16))
        _, pull_wide = jax.vjp(lambda *x, c=carry: ring_jax.flash_attention(*x, *bounds, carry=c)[0], q, k, v)
        for ours, theirs in zip(pull(found), pull_wide(found.astype(jnp.float32)), strict=True):
            error = np.linalg.norm(np.float32(ours) - np.float32(theirs)) / np.linalg.norm(np.float32(theirs))
            assert error < 1e-2
