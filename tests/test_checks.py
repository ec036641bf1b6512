"""The checks that every public call shares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ring_jax import _checks as checks


def test_axes_bind_sizes_from_array_to_array():
    sizes: dict[str, int] = {}
    checks.check_array("query", jnp.ones((2, 3, 4, 8)), "B T N H", sizes)
    assert sizes == {"B": 2, "T": 3, "N": 4, "H": 8}
    checks.check_array("sinks", np.ones(4, np.float32), "N", sizes)
    with pytest.raises(
        ValueError, match=r"key must have shape \[B=2, S=5, K=2, H=8\], got \(2, 5, 2, 4\): axis 3 differs"
    ):
        checks.check_array("key", jnp.ones((2, 5, 2, 4)), "B S K H", sizes)
    with pytest.raises(ValueError, match=r"pair must have shape \[B=2, 2\], got \(2, 3\)"):
        checks.check_array("pair", jnp.ones((2, 3)), "B 2", sizes)


@pytest.mark.parametrize("value", [[1.0], None, "text", 3, object()])
def test_what_is_no_array(value):
    with pytest.raises(TypeError, match=r"x must be an array \[B, T\], got .*jnp.asarray"):
        checks.check_array("x", value, "B T")


def test_rank_and_dtype():
    with pytest.raises(ValueError, match=r"x must have 2 axes \[B, T\], got shape \(3,\); lay it out"):
        checks.check_array("x", jnp.ones(3), "B T", advice="lay it out")
    with pytest.raises(ValueError, match="ids must be signed integers, got uint8"):
        checks.check_array("ids", jnp.ones(3, jnp.uint8), kind="signed")
    with pytest.raises(ValueError, match="x must be floating point, got int32"):
        checks.check_array("x", jnp.ones(3, jnp.int32))
    checks.check_array("x", jnp.ones(3, jnp.bfloat16))
    checks.check_array("x", jnp.ones(3, bool), kind="any")


def test_counts():
    assert checks.check_count("n", np.int64(3), 1, 3) == 3
    assert checks.check_count("n", jnp.int32(3)) == 3
    for wrong in (2.0, True, "3", None, [3], np.bool_(True), jnp.array([1, 2]), jnp.float32(2)):
        with pytest.raises(TypeError, match="n must be an integer"):
            checks.check_count("n", wrong)
    with pytest.raises(ValueError, match=r"n must be in \[0, 2\], got 3"):
        checks.check_count("n", 3, 0, 2)
    with pytest.raises(ValueError, match=r"n must be >= 0, got -1"):
        checks.check_count("n", -1)
    with pytest.raises(ValueError, match="n must be known at trace time"):
        jax.eval_shape(lambda n: checks.check_count("n", n), jnp.int32(1))


def test_numbers():
    assert checks.check_number("scale", np.float32(0.5)) == 0.5
    assert checks.check_number("scale", jnp.bfloat16(0.5)) == 0.5
    for wrong in (True, "1", None, [1.0], 1j, jnp.ones(2)):
        with pytest.raises(TypeError, match="scale must be "):
            checks.check_number("scale", wrong)
    for wrong in (float("nan"), float("inf"), 0.0):
        with pytest.raises(ValueError, match="scale must be finite and > 0"):
            checks.check_number("scale", wrong, above=0)


def test_flags_and_choices():
    assert checks.check_flag("f", np.bool_(True)) is True
    assert checks.check_flag("f", None, optional=True) is None
    for wrong in (1, "yes", None):
        with pytest.raises(TypeError, match="f must be True or False"):
            checks.check_flag("f", wrong)
    assert checks.check_choice("strategy", "ring", ("auto", "ring")) == "ring"
    with pytest.raises(TypeError, match=r"strategy must be a name, got \['ring'\] \(list\)"):
        checks.check_choice("strategy", ["ring"], ("auto", "ring"))
    with pytest.raises(ValueError, match=r"unknown strategy 'rings': expected one of \['auto', 'ring'\] or None"):
        checks.check_choice("strategy", "rings", ("auto", "ring"), optional=True)


def test_integers_saturate_at_int32():
    big = np.array([2**40, -(2**40), 7])
    np.testing.assert_array_equal(checks.to_int32(big), [2**31 - 1, -(2**31), 7])
    assert checks.to_int32(np.array([2**32 - 1], np.uint32)) == 2**31 - 1
    traced = jax.jit(lambda x: checks.to_int32(x))(jnp.array([2**32 - 1, 5], jnp.uint32))
    np.testing.assert_array_equal(traced, [2**31 - 1, 5])
