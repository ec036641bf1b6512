"""Shapes and dtypes in the annotations of the whole package, checked in every test: after a call, not before it.

jaxtyping checks arguments first. But public calls check their own arguments and say what to do, and tests of bad input expect just
that. So a call that raises is left alone, and one that succeeds must have had, and given, what its annotations say. Annotations
without a shape are left to mypy.
"""

import inspect
import random
from collections.abc import Callable, Sequence
from typing import Any, get_args, get_origin

import jax
import jaxtyping
import numpy as np
from beartype import beartype


def has_shape(hint: Any) -> bool:
    """Whether an annotation says a shape somewhere."""
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(has_shape, get_args(hint)))


def has_items(hint: Any) -> bool:
    """Whether beartype looks at one item of a container, which it draws: hypothesis wants nobody else to draw."""
    return get_origin(hint) in (list, dict, Sequence) or any(map(has_items, get_args(hint)))


def after(stub: Callable) -> Callable:
    """The check of a function, from the stubs that jaxtyping makes of it: one of its parameters, and one, called after it, that takes
    its result, too. It is made at the first call: most functions are never called in a process."""
    hints = {name: hint if has_shape(hint) else Any for name, hint in stub.__annotations__.items()}
    # jax rebuilds dataclasses around whatever leaves it has at hand.
    if "ret0" not in hints or stub.__name__ == "__init__" or set(hints.values()) == {Any}:
        return stub
    stub.__annotations__ = hints
    made: list[Callable] = []
    draws = any(map(has_items, hints.values()))

    def late(*args, **kwargs):
        if not made:
            made.append(beartype(stub))
        if not draws:
            return made[0](*args, **kwargs)
        state = random.getstate()
        try:
            return made[0](*args, **kwargs)
        finally:
            random.setstate(state)

    return late


def install() -> None:
    """From here on modules of the package are imported with checks."""
    jaxtyping.Array = jax.Array | np.ndarray  # public calls take NumPy's arrays, too
    jaxtyping.install_import_hook("ring_jax", "tests.support.shapes.after")
