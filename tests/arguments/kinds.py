"""What can be wrong with an argument, by the kind of argument: bad values, each with the error that it deserves.

Values are made from a good one, so that only one thing is wrong at a time. All arrays are NumPy's: nothing here touches
a device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Errors = tuple[type[Exception], ...]
TYPE: Errors = (TypeError,)
VALUE: Errors = (ValueError, NotImplementedError)
EITHER: Errors = (TypeError, ValueError, NotImplementedError)


class Thing:
    """Nothing that any call could use."""

    def __repr__(self) -> str:
        return "Thing()"


@dataclass(frozen=True)
class Bad:
    """One bad value, what is wrong with it, and which errors are right. `traced` holds where values are not known, too."""

    what: str
    value: Any
    errors: Errors
    traced: bool = True


@dataclass(frozen=True)
class Kind:
    """A kind of argument."""

    optional: bool = field(default=False, kw_only=True)

    def bad(self, good: Any) -> Iterator[Bad]:
        """Bad values in the place of `good`."""
        if not self.optional:
            yield Bad("None", None, TYPE)
        yield Bad("object", Thing(), TYPE)
        yield Bad("dict", {}, TYPE)
        yield Bad("set", {1}, TYPE)
        yield Bad("bytes", b"ring", TYPE)
        yield Bad("complex", 1 + 2j, TYPE)
        yield Bad("ellipsis", ..., TYPE)
        yield from self.more(good)

    def more(self, good: Any) -> Iterator[Bad]:
        yield from ()


def _types(**values: Any) -> Iterator[Bad]:
    return (Bad(what, value, TYPE) for what, value in values.items())


def _values(**values: Any) -> Iterator[Bad]:
    return (Bad(what, value, VALUE) for what, value in values.items())


OTHER_DTYPES = {
    "floating": (np.int32, np.bool_, np.complex64, np.uint8, np.str_, np.object_),
    "integer": (np.float32, np.bool_, np.complex64, np.str_, np.object_),
    "signed": (np.float32, np.bool_, np.complex64, np.uint32, np.str_),
    "bool": (np.float32, np.int32, np.complex64, np.str_),
    "any": (np.str_, np.object_, "datetime64[s]"),
}


@dataclass(frozen=True)
class Arr(Kind):
    """An array: `bound` axes have a size that something else decides; lists of numbers are taken with `lists`."""

    dtype: str = "floating"
    bound: tuple[int, ...] = ()
    ranks: bool = True
    much: bool = True  # whether three times the size is bad, too
    shapes: tuple[tuple[int, ...], ...] = ()  # bad ones
    lists: bool = False
    scalars: bool = False
    known: tuple[tuple[str, Any], ...] = ()  # bad values of a right type, where values are known

    def more(self, good):
        good = np.asarray(good)
        yield from _types(text="text", function=len, type=np.ndarray)
        if not self.scalars:
            yield from _types(bool=True, float=2.5, nan=float("nan"))
            yield Bad("int", 3, EITHER if self.lists else TYPE)
        else:
            yield Bad("bool", True, TYPE)
            yield Bad("float", 2.5, TYPE)
            yield Bad("nan", float("nan"), TYPE)
            yield Bad("NumPy bool", np.True_, EITHER)
        if not self.lists:
            yield from _types(list=good.tolist() if good.ndim else [1.0], tuple=(1, 2), empty=[])
        else:
            for what, value in {"texts": ["a"], "floats": [1.5], "bools": [True], "Nones": [None]}.items():
                yield Bad(what, value, EITHER)
            yield Bad("ragged", [[1], [2, 3]], EITHER)
            yield Bad("beyond 64 bits", [2**70], EITHER)
            yield Bad("empty", [], EITHER)
        yield Bad("abstract", jax.ShapeDtypeStruct(good.shape, good.dtype), TYPE)
        for dtype in OTHER_DTYPES[self.dtype]:
            if np.dtype(dtype).kind not in "USOM":
                yield Bad(f"dtype {np.dtype(dtype)}", good.astype(dtype), VALUE)
            else:
                yield Bad(f"dtype {np.dtype(dtype)}", np.full(good.shape, None).astype(dtype), VALUE, traced=False)
        if self.ranks:
            more = good[None, None] if self.scalars and good.ndim == 0 else good[None]  # one integer or [B]
            yield Bad("axes more", more, VALUE)
            if good.ndim and not (self.scalars and good.ndim == 1):
                yield Bad("one axis less", good[0], VALUE)
            yield Bad("five axes more", good[None, None, None, None, None], VALUE)
        for shape in self.shapes:
            yield Bad(f"shape {shape}", np.ones(shape, good.dtype), VALUE)
        for axis in self.bound:
            yield Bad(f"axis {axis} longer", np.concatenate([good, good[_first(axis)]], axis), VALUE)
            if self.much:
                yield Bad(f"axis {axis} much longer", np.repeat(good, 3, axis), VALUE)
            if good.shape[axis] > 2:
                yield Bad(f"axis {axis} shorter", np.delete(good, 0, axis), VALUE)
        for what, value in self.known:
            yield Bad(what, np.asarray(value), VALUE, traced=False)


def _first(axis: int) -> tuple[slice, ...]:
    return (slice(None),) * axis + (slice(0, 1),)


@dataclass(frozen=True)
class Number(Kind):
    """A finite number, beyond `above` or from `low` to `high`."""

    above: float | None = None
    low: float | None = None
    high: float | None = None

    def more(self, good):
        yield from _types(text="1.0", bool=True, list=[1.0], tuple=(1.0,), function=len, type=float)
        yield Bad("NumPy bool", np.True_, EITHER)
        yield Bad("several", np.ones(2, np.float32), EITHER)  # a traced one is a wrong value
        yield Bad("complex array", np.complex64(1j), TYPE)
        yield from _values(nan=float("nan"), inf=float("inf"), minus_inf=-float("inf"), NumPy_nan=np.float32("nan"))
        if self.above is not None:
            yield from _values(at_bound=self.above, below=self.above - 1, far_below=-1e30)
        if self.low is not None:
            yield from _values(below=self.low - 0.5, far_below=-1e30)
        if self.high is not None:
            yield from _values(beyond=self.high + 0.5, far_beyond=1e30)


@dataclass(frozen=True)
class Count(Kind):
    """An integer that is known at trace time, from `low` to `high`."""

    low: int = 0
    high: int | None = None

    def more(self, good):
        yield from _types(text="3", bool=True, float=2.5, whole_float=3.0, nan=float("nan"), list=[3], tuple=(3,))
        yield from _types(NumPy_float=np.float32(3), NumPy_bool=np.True_, function=len)
        yield Bad("several", np.array([1, 2]), EITHER)  # a traced one is a wrong value
        yield from _values(below=self.low - 1, far_below=-(10**30), NumPy_below=np.int64(self.low - 1))
        if self.high is not None:
            yield from _values(beyond=self.high + 1, far_beyond=10**30, NumPy_beyond=np.int64(self.high + 1))


@dataclass(frozen=True)
class Flag(Kind):
    """True or False."""

    def more(self, good):
        yield from _types(zero=0, one=1, text="True", float=1.0, list=[True], array=np.array([True]), nan=float("nan"))


@dataclass(frozen=True)
class Choice(Kind):
    """One of some names."""

    def more(self, good):
        yield from _types(list=["ring"], tuple=("ring",), int=3, float=2.5, bool=True, function=len)
        yield Bad("array", np.array([1, 2]), TYPE)
        yield from _values(unknown="nonsense", empty="", upper="RING ")


@dataclass(frozen=True)
class Instance(Kind):
    """A value of a class of ours."""

    def more(self, good):
        yield from _types(text="text", int=3, float=2.5, bool=True, list=[good], type=type(good), function=len)
        yield Bad("array", np.ones(2, np.float32), EITHER)


@dataclass(frozen=True)
class Axes(Kind):
    """Mesh axes."""

    most: int | None = None

    def more(self, good):
        yield from _types(int=3, float=2.5, bool=True, mixed=["a", 3], nested=(("a",),), function=len)
        yield from _values(empty="", none_of_them=(), twice=("a", "a"), empty_inside=("a", ""))
        if self.most is not None:
            yield Bad("too many", tuple("abcdefg"[: self.most + 1]), VALUE)


@dataclass(frozen=True)
class DType(Kind):
    """A floating-point dtype."""

    def bad(self, good):
        if not self.optional:
            yield Bad("None", None, TYPE)
        yield from _types(object=Thing(), int=3, float=2.5, bool=True, list=["f4"], dict={}, set={1}, function=len)
        yield Bad("unknown", "nonsense", EITHER)
        yield from _values(int32="int32", integers=jnp.int32, booleans=bool, complexes=np.complex64)


@dataclass(frozen=True)
class Function(Kind):
    """Something to call."""

    def more(self, good):
        yield from _types(text="text", int=3, list=[len], array=np.ones(2))


@dataclass(frozen=True)
class LayoutLike(Kind):
    """A layout or its name."""

    def more(self, good):
        import ring_jax

        yield from _types(int=3, float=2.5, bool=True, list=["zigzag"], type=ring_jax.Zigzag, array=np.ones(2))
        yield from _values(unknown="spiral", empty="", upper="ZIGZAG")


@dataclass(frozen=True)
class MaskLike(Kind):
    """A `Mask`."""

    def more(self, good):
        import ring_jax

        yield from _types(text="causal", int=3, bool=True, list=[ring_jax.causal()], function=ring_jax.causal)
        yield Bad("array", np.ones((8, 8), bool), EITHER)


@dataclass(frozen=True)
class Precision(Kind):
    """Of a product."""

    def more(self, good):
        yield from _types(int=3, float=2.5, bool=True, list=["highest"], array=np.ones(2))
        yield from _values(unknown="nonsense")


@dataclass(frozen=True)
class Text(Kind):
    """Text."""

    values: tuple[tuple[str, str], ...] = ()

    def more(self, good):
        yield from _types(int=3, float=2.5, bool=True, list=["a"], array=np.ones(2))
        yield from _values(**dict(self.values))


@dataclass(frozen=True)
class Custom(Kind):
    """Bad values of its own, beside those that nothing takes."""

    types: tuple[Any, ...] = ()
    values: tuple[Any, ...] = ()
    common: bool = True

    def bad(self, good):
        if self.common:
            yield from super().bad(good)
        for value in self.types:
            yield Bad(f"of a wrong type: {str(value)[:40]}", value, TYPE)
        for value in self.values:
            yield Bad(f"of a wrong value: {str(value)[:40]}", value, VALUE)


def maybe(kind: Kind) -> Kind:
    """The same, where None is taken too."""
    return replace(kind, optional=True)
