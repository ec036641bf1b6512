"""A model as functions of its parameters: checks, padding and the one shard_map around each pass."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ring_jax._checks import check_array, check_choice, check_count, check_flag, to_int32
from ring_jax._mesh import axis_size, reshard_explicit, run_sharded
from ring_jax.gdn import segments
from ring_jax.layout import Striped
from ring_jax.models.qwen3_5 import checks
from ring_jax.models.qwen3_5.cache import Cache, cache_specs
from ring_jax.models.qwen3_5.forward import Decode, Forward, Output, Wanted
from ring_jax.models.qwen3_5.loss import Loss, next_tokens
from ring_jax.models.qwen3_5.past import Chunk, Chunks, Past, gdn_specs
from ring_jax.models.qwen3_5.sharding import VOCABULARY, Sharding
from ring_jax.models.qwen3_5.structure import Structure
from ring_jax.moe import RouterStats

LOGITS = ("all", "last", "none")

COMPILER_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
"""For `jax.jit(..., compiler_options=)` of a prefill, of loss and gradient, and of a loop over decode steps: cuBLAS's products read the
slices of stacked weights where they lie, Triton's are slower and have them copied. Qwen3.5-9B, prefill of 8192 tokens on an H100: 192 ms
instead of 200. A single decode step is the exception: it would lose 3 to 5%. jax takes such options for the outermost jit only, so
the model cannot set them."""


class Program(Structure):
    """A model without its parameters, which each call takes first: what to jit. Hashable; `Qwen3_5.split` makes it.

    Example:
        >>> from ring_jax.data import passkey
        >>> from ring_jax.models.qwen3_5 import Qwen3_5
        >>> program, params = Qwen3_5.from_pretrained(passkey.MODEL).split()
        >>> jax.jit(program)(params, jnp.asarray([[72, 101]])).logits.shape
        (1, 2, 264)
    """

    def __call__(
        self,
        params: Any,
        tokens: Any,
        *,
        past: Past | None = None,
        lengths: Any = None,
        segment_ids: Any = None,
        logits: str = "all",
        cache_room: int | None = None,
        return_hidden: bool = False,
        return_stats: bool = False,
        return_new: bool = False,
    ) -> Output:
        """As `Qwen3_5.__call__`."""
        if cache_room is not None:
            cache_room = check_count("cache_room", cache_room, 1)
        checks.check_inputs(self, params, tokens, lengths, segment_ids, cache_room or 0, past)
        check_choice("logits", logits, LOGITS)
        for name, flag in (("hidden", return_hidden), ("stats", return_stats), ("new", return_new)):
            check_flag(f"return_{name}", flag)
        if segment_ids is not None and (logits == "last" or cache_room is not None or return_new):
            raise ValueError(
                "packed documents (segment_ids) have no one last token: no logits='last', no cache_room, no return_new; prompts of "
                "several lengths are padded on the right and say so by lengths="
            )
        if past is not None and cache_room is not None:
            raise ValueError(
                "cache_room is of a pass without a past: ask for return_new, and go on with past.then(out.new)"
            )
        if return_stats and self.config.experts is None:
            raise ValueError("return_stats: this model has no experts")
        tokens = jnp.asarray(tokens)
        lengths, segment_ids = (None if x is None else jnp.asarray(x) for x in (lengths, segment_ids))
        wanted = Wanted(logits, cache_room, return_hidden, return_stats, return_new)
        same = past is not None and tokens.shape[1] == 1 and wanted.last_only
        specs = None if self.sharding is None else self._output_specs(wanted, self.sharding, same)
        local = Forward(self, wanted, tokens.shape[1], same)
        out = self._run(local, specs, params, tokens, lengths, segment_ids, past, same=same)
        return out if self.sharding is None else _cut(out, tokens.shape[1], self.sharding)

    def loss(
        self,
        params: Any,
        tokens: Any,
        *,
        lengths: Any = None,
        segment_ids: Any = None,
        weights: Any = None,
        chunk: int = 1024,
    ) -> jax.Array:
        """As `Qwen3_5.loss`."""
        check_count("chunk", chunk, 1)
        checks.check_inputs(self, params, tokens, lengths, segment_ids)
        if weights is not None:
            check_array("weights", weights, "B S", dict(zip("BS", tokens.shape, strict=True)), advice="as the tokens")
        arrays: list[Any] = [None if x is None else jnp.asarray(x) for x in (tokens, lengths, segment_ids, weights)]
        if self.sharding is not None:  # the next token may lie on another rank: tokens are small, so all have them
            mesh, rows = self.sharding.resolve_mesh(), P(self.sharding.batch)
            arrays = [None if x is None else reshard_explicit(x, mesh, rows) for x in arrays]
        tokens, lengths, segment_ids, weights = arrays
        labels = next_tokens(tokens, lengths, segment_ids, weights)
        return self._run(Loss(self, tokens.shape[1], chunk), P(), params, tokens, lengths, segment_ids, labels)

    def decode(self, params: Any, tokens: Any, cache: Cache) -> tuple[jax.Array, Cache]:
        """As `Qwen3_5.decode`."""
        checks.check_cache(self.config, cache)
        sizes = {"B": cache.lengths.shape[0]}
        check_array("tokens", tokens, "B", sizes, kind="integer", advice="one a row of the cache")
        checks.check_has_parameters(params)
        checks.check_vocabulary(self.config, tokens, None, None)
        checks.check_room(cache)
        operands = params, jnp.asarray(tokens), cache
        if self.sharding is None:
            logits, new, states = _run_here(Decode(self), *operands)
        else:
            mesh, rows, caches = self.sharding.resolve_mesh(), P(self.sharding.batch), cache_specs(self.sharding)
            specs = self.param_specs(params, mesh), rows, caches
            logits, new, states = run_sharded(Decode(self), mesh, specs, (rows, caches.new_kv, caches.gdn), operands)
        return logits, dataclasses.replace(cache, new_kv=new, gdn=states, count=cache.count + 1)

    def _run(
        self,
        local: Callable[..., Any],
        out_specs: Any,
        params: Any,
        tokens: jax.Array,
        lengths: jax.Array | None,
        segment_ids: jax.Array | None,
        last: Any,
        *,
        same: bool = False,
    ) -> Any:
        """`local` on every rank's share of the tokens, laid out by itself; `last` is a past, or labels as the tokens. `same`: all
        context ranks have the tokens."""
        length = tokens.shape[1]
        if lengths is not None:
            lengths = to_int32(jnp.clip(lengths, 0, length))  # traced ones: no row is longer than the tokens
        if self.sharding is None:
            return _run_here(local, params, tokens, lengths, segment_ids, last)
        sharding, mesh = self.sharding, self.sharding.resolve_mesh()
        rows, sequence = P(sharding.batch), P(sharding.batch, sharding.sequence)
        pad = 0 if same else sharding.context.padded_length(length, tokens) - length
        tokens = _pad_end(tokens, pad)
        if isinstance(last, tuple):
            last_specs: Any = (sequence,) * len(last)
            last = _pad_end(last, pad)
        else:
            last_specs = None if last is None else last.specs(sharding)
        if segment_ids is not None:
            segment_ids = _pad_end(segment_ids, pad, segments.PADDING)
        in_specs = (
            self.param_specs(params, mesh),
            rows if same else sequence,
            None if lengths is None else rows,
            None if segment_ids is None else rows,  # masks need the whole
            last_specs,
        )
        return run_sharded(local, mesh, in_specs, out_specs, (params, tokens, lengths, segment_ids, last))

    def _output_specs(self, wanted: Wanted, sharding: Sharding, same: bool) -> Any:
        vocabulary = sharding.spec((self.config.vocab_size,), (VOCABULARY,), sharding.resolve_mesh())[0]
        row, sequence = P(sharding.batch), P(None, sharding.batch, sharding.sequence)
        logits = {"all": P(sharding.batch, sharding.sequence, vocabulary), "last": row, "none": None}
        layout = Striped() if same else sharding.context.layout
        keys: Any = P(*sequence, sharding.tensor)
        specs: Any = Output  # a tree of specs in the place of arrays
        return specs(
            logits[wanted.logits],
            None if wanted.cache_room is None else cache_specs(sharding),
            sequence if wanted.hidden else None,
            jax.tree.map(lambda _: P(), RouterStats(0, 0, 0)) if wanted.stats else None,  # type: ignore[arg-type]
            Chunks((Chunk(keys, row, layout),), gdn_specs(sharding), row) if wanted.new else None,  # type: ignore[arg-type]
        )


@functools.partial(jax.jit, static_argnums=0)
def _run_here(local: Callable[..., Any], *operands: Any) -> Any:
    """Without a mesh, jitted like the sharded form: eager calls would take seconds, operation by operation."""
    return local(*operands)


def _pad_end(tree: Any, pad: int, value: int = 0) -> Any:
    if pad == 0:
        return tree
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, pad)), constant_values=value), tree)


def _cut(out: Output, length: int, sharding: Sharding) -> Output:
    """Without the padding of the layout."""
    mesh = sharding.resolve_mesh()

    def cut(x: jax.Array | None, axis: int) -> Any:
        if x is None or x.shape[axis] == length:
            return x
        if length % axis_size(mesh, sharding.sequence):  # no longer divides: Explicit meshes want that said
            spec: list[Any] = [None] * x.ndim
            spec[axis - 1] = sharding.batch
            x = reshard_explicit(x, mesh, P(*spec))
        return jax.lax.slice_in_dim(x, 0, length, axis=axis)

    logits = out.logits if out.logits is None or out.logits.ndim == 2 else cut(out.logits, 1)
    return dataclasses.replace(out, logits=logits, hidden=cut(out.hidden, 2))
