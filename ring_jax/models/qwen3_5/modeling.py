"""Qwen3.5, Qwen3.5 MoE and Qwen3-Next.

    x = embed[tokens];   for each layer:  x += mixer(norm(x));  x += mlp(norm(x));   logits = norm(x) lm_head

where three of four mixers are gated delta rules, the fourth full attention. Layers are stacked in groups, one
repetition of that pattern each, and a scan walks the groups: a program has the size of one group whatever the depth.
In decode a loop walks them, so that nothing but reading the weights takes time.

The whole model is one `shard_map`, manual over every mesh axis. Tokens enter in natural order and are laid out once;
full attention runs as ring attention, runs of GDN layers as `ring_jax.gdn.run` spreads them; everything else acts on
tokens one by one. Here is what users call; `passes.py` is one pass over all layers, `layers.py` the layers, written as for
one device, `local.py` what of them needs the mesh.

Sources: transformers' `modeling_qwen3_5.py`, `modeling_qwen3_5_moe.py`, `modeling_qwen3_next.py` for the mathematics;
Yang et al., Gated Delta Networks (arXiv:2412.06464); Qiu et al., Gated Attention (arXiv:2505.06708).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from ring_jax import _repr
from ring_jax._checks import concrete
from ring_jax.context.parallel import Static, axis_size, place, run_sharded
from ring_jax.gdn import segments
from ring_jax.models.qwen3_5 import passes
from ring_jax.models.qwen3_5.cache import Cache, cache_specs
from ring_jax.models.qwen3_5.config import Config
from ring_jax.models.qwen3_5.initial import initialise, param
from ring_jax.models.qwen3_5.layers import Group
from ring_jax.models.qwen3_5.passes import Ask, Output
from ring_jax.models.qwen3_5.sharding import REDUCED, VOCABULARY, WHOLE, Sharding
from ring_jax.moe import RouterStats

REMAT = (None, "full", "attention")
LOGITS = ("all", "last", "none")


class Qwen3_5(nnx.Module):
    """A Qwen3.5, Qwen3.5 MoE or Qwen3-Next language model.

    Args:
        config: sizes; `Config.preset(...)`, `Config.from_hf(...)`.
        rngs: for the initial parameters; None leaves them abstract (shapes only).
        dtype: of activations; float32 where the reference keeps it (decays, norms, logits, router).
        param_dtype: of parameters (default: dtype). Train bfloat16 activations with float32 parameters.
        sharding: the mesh axes; None for one device. Parameters are created where they belong. Results are the same
            for any mesh.
        remat: what the backward pass computes again: None nothing, "full" every group of layers, "attention" all but
            full attention's results.
        implementation: of the flash block (default: the best that runs here).

    Example:
        >>> model = Qwen3_5(Config.preset("qwen3.5-0.8b"), rngs=nnx.Rngs(0))  # doctest: +SKIP
        >>> model(tokens, logits="last").logits  # doctest: +SKIP
    """

    def __init__(
        self,
        config: Config,
        *,
        rngs: nnx.Rngs | None,
        dtype: Any = jnp.bfloat16,
        param_dtype: Any = None,
        sharding: Sharding | None = None,
        remat: str | None = None,
        implementation: str | None = None,
    ):
        if remat not in REMAT:
            raise ValueError(f"remat must be one of {REMAT}, got {remat!r}")
        self.config, self.dtype, self.sharding = config, jnp.dtype(dtype), sharding
        self.remat, self.implementation = remat, implementation
        dtype = self.dtype if param_dtype is None else jnp.dtype(param_dtype)
        width, vocabulary = config.hidden_size, config.vocab_size
        self.embed = param((vocabulary, width), (VOCABULARY, REDUCED), "columns", dtype)
        self.groups = Group(config, dtype)
        self.final_norm = param((width,), (WHOLE,), "zeros", dtype)
        self.lm_head = (
            None if config.tie_embeddings else param((width, vocabulary), (REDUCED, VOCABULARY), "rows", dtype)
        )
        if rngs is not None:
            initialise(self, rngs.params())

    def __repr__(self) -> str:
        sizes = {"family": self.config.family, "layers": self.config.num_layers, "dtype": str(self.dtype)}
        return _repr.of_module(self, **sizes, sharding=self.sharding)

    # -- running ---------------------------------------------------------------------------------

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        *,
        lengths: Int[Array, " B"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
        logits: str = "all",
        cache_room: int | None = None,
        return_hidden: bool = False,
        return_stats: bool = False,
    ) -> Output:
        """One pass over whole sequences, in natural order, of any length.

        Args:
            tokens: int32 [B, S].
            lengths: int32 [B], real tokens of each row, the rest is padding on the right.
            segment_ids: int [B, S], packed documents; negative ids are padding. Not together with `lengths`.
            logits: "all", "last" (of each row's last real token) or "none".
            cache_room: return a cache with room for that many new tokens.
            return_hidden: return what every layer hands on.
            return_stats: return the routers' statistics, for `ring_jax.moe.load_balance_loss`.

        Raises:
            ValueError: arguments that do not fit together, or more tokens than the model has positions.
        """
        tokens = jnp.asarray(tokens)
        lengths, segment_ids = (None if x is None else jnp.asarray(x) for x in (lengths, segment_ids))
        self._check_inputs(tokens, lengths, segment_ids)
        if logits not in LOGITS:
            raise ValueError(f"logits must be one of {LOGITS}, got {logits!r}")
        if segment_ids is not None and (logits == "last" or cache_room is not None):
            raise ValueError("packed documents (segment_ids) have no one last token: no logits='last', no cache_room")
        if cache_room is not None and cache_room < 1:
            raise ValueError(f"cache_room must be positive, got {cache_room}")
        if return_stats and self.config.experts is None:
            raise ValueError("return_stats: this model has no experts")
        ask = Ask(logits, cache_room, return_hidden, return_stats, tokens.shape[1])
        specs = None if self.sharding is None else self._output_specs(ask, self.sharding)
        out = self._run_prompt(passes.forward, specs, ask, tokens, lengths, segment_ids, None)
        return out if self.sharding is None else _cut(out, tokens.shape[1], self.sharding)

    def loss(
        self,
        tokens: Int[Array, "B S"],
        *,
        lengths: Int[Array, " B"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
        weights: Float[Array, "B S"] | None = None,
        chunk: int = 1024,
    ) -> Float[Array, ""]:
        """Mean cross entropy of every next token (float32, nats), plus the load-balance loss of the experts.

        Logits are formed `chunk` tokens at a time, forward and backward: [B, S, V] never exists.

        Args:
            tokens, lengths, segment_ids: as in a call; no token predicts one of another document.
            weights: float [B, S], weight of predicting the token at that place (place 0 predicts nothing).
            chunk: tokens of a rank whose logits exist at a time.
        """
        from ring_jax.models.qwen3_5.training import local_loss, next_tokens

        if chunk < 1:
            raise ValueError(f"chunk must be positive, got {chunk}")
        arrays: list[Any] = [None if x is None else jnp.asarray(x) for x in (tokens, lengths, segment_ids, weights)]
        self._check_inputs(*arrays[:3])
        if self.sharding is not None:  # the next token may lie on another rank: tokens are small, so all have them
            arrays = [
                None if x is None else place(x, self.sharding.resolve_mesh(), P(self.sharding.batch)) for x in arrays
            ]
        tokens, lengths, segment_ids, weights = arrays
        if weights is not None and weights.shape != tokens.shape:
            raise ValueError(f"weights must be [B, S] = {tokens.shape} as the tokens, got {weights.shape}")
        ask = Ask("none", None, False, self.config.experts is not None, tokens.shape[1], chunk)
        labels = next_tokens(tokens, lengths, segment_ids, weights)
        return self._run_prompt(local_loss, P(), ask, tokens, lengths, segment_ids, labels)

    def decode(self, tokens: Int[Array, " B"], cache: Cache) -> tuple[Float[Array, "B V"], Cache]:
        """One more token for each row.

        Args:
            tokens: int32 [B], the tokens after what the cache holds.
            cache: of `model(..., cache_room=...)` or of the last step. Donate it under jit.

        Returns:
            float32 logits [B, V] of the token after, and the cache.

        Raises:
            ValueError: no room left, where the count is known; under jit the host has to count (a step beyond the room
            overwrites nothing, but its own token is forgotten).
        """
        tokens = jnp.asarray(tokens)
        known = concrete(cache.count)
        if known is not None and known >= cache.room:
            raise ValueError(
                f"the cache had room for {cache.room} new tokens and holds {known}: ask for more cache_room"
            )
        if tokens.ndim != 1 or tokens.shape != cache.lengths.shape:
            raise ValueError(
                f"tokens must be [B] = {cache.lengths.shape}, one for each row of the cache, got {tokens.shape}"
            )
        graph, params = self._split()
        if self.sharding is None:
            logits, new, states = _run_here(Static(passes.decode, (graph,)), params, tokens, cache)
        else:
            mesh, rows, caches = self.sharding.resolve_mesh(), P(self.sharding.batch), cache_specs(self.sharding)
            in_specs, out_specs = (
                (self.param_specs(self.sharding, mesh), rows, caches),
                (rows, caches.new_kv, caches.gdn),
            )
            operands = (params, tokens, cache)
            logits, new, states = run_sharded(Static(passes.decode, (graph,)), mesh, in_specs, out_specs, operands)
        return logits, dataclasses.replace(cache, new_kv=new, gdn=states, count=cache.count + 1)

    def _run_prompt(self, local, out_specs, ask: Ask, tokens, lengths, segment_ids, labels):
        """`local` on every rank's share of the prompts, laid out by itself."""
        length, room, limit = tokens.shape[1], ask.cache_room or 0, self.config.max_positions
        if length + room > limit:
            raise ValueError(f"{length} tokens and room for {room} more exceed the model's {limit} positions")
        graph, params = self._split()
        if self.sharding is None:
            return _run_here(Static(local, (graph, ask)), params, tokens, lengths, segment_ids, labels)
        sharding, mesh = self.sharding, self.sharding.resolve_mesh()
        rows, sequence = P(sharding.batch), P(sharding.batch, sharding.sequence)
        pad = sharding.context.padded_length(length, tokens) - length
        tokens, labels = _pad_end((tokens, labels), pad)
        if segment_ids is not None:
            segment_ids = _pad_end(segment_ids, pad, segments.PADDING)
        in_specs = (
            self.param_specs(sharding, mesh),
            sequence,
            None if lengths is None else rows,
            None if segment_ids is None else rows,  # masks need the whole
            None if labels is None else (sequence, sequence),
        )
        operands = (params, tokens, lengths, segment_ids, labels)
        return run_sharded(Static(local, (graph, ask)), mesh, in_specs, out_specs, operands)

    def _check_inputs(self, tokens, lengths, segment_ids) -> None:
        """Raises ValueError for shapes and values that do not fit; values only where they are known now."""
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer) or 0 in tokens.shape:
            raise ValueError(f"tokens must be integers [B, S], got {tokens.dtype} {tokens.shape}")
        batch, length = tokens.shape
        if lengths is not None and segment_ids is not None:
            raise ValueError("give lengths or segment_ids, not both: padding has negative segment ids")
        if segment_ids is not None and segment_ids.shape != tokens.shape:
            raise ValueError(f"segment_ids must be [B, S] = {tokens.shape} as the tokens, got {segment_ids.shape}")
        if lengths is not None:
            if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
                raise ValueError(f"lengths must be integers [B] = {(batch,)}, got {lengths.dtype} {lengths.shape}")
            known = concrete(lengths)
            if known is not None and not ((known >= 1) & (known <= length)).all():
                raise ValueError(f"lengths must be from 1 to {length} (the tokens' S), got {known.tolist()}")
        if self.sharding is not None:
            if self.sharding.context.is_manual:
                raise ValueError("the model is a shard_map of its own: call it outside of yours, on global arrays")
            ranks = axis_size(self.sharding.resolve_mesh(), self.sharding.batch)
            if batch % ranks:
                raise ValueError(
                    f"a batch of {batch} does not divide over batch_axis={self.sharding.batch!r} of size {ranks}: pad the "
                    "batch, or leave batch_axis out"
                )
        if isinstance(self.embed.get_value(), jax.ShapeDtypeStruct):
            raise ValueError(
                "this model has no parameters yet (rngs=None): load some with set_parameters or from_pretrained"
            )

    def _output_specs(self, ask: Ask, sharding: Sharding) -> Any:
        vocabulary = self._vocabulary_axis(sharding.resolve_mesh())
        logits = {"all": P(sharding.batch, sharding.sequence, vocabulary), "last": P(sharding.batch), "none": None}
        specs: Any = Output  # a tree of specs in the place of arrays
        return specs(
            logits[ask.logits],
            None if ask.cache_room is None else cache_specs(sharding),
            P(None, sharding.batch, sharding.sequence) if ask.hidden else None,
            jax.tree.map(lambda _: P(), RouterStats(0, 0, 0)) if ask.stats else None,  # type: ignore[arg-type]
        )

    def _vocabulary_axis(self, mesh) -> Any:
        assert self.sharding is not None
        return self.sharding.spec((self.config.vocab_size,), (VOCABULARY,), mesh)[0]

    # -- parameters ------------------------------------------------------------------------------

    def _split(self):
        graph, state = nnx.split(self)
        return graph, nnx.to_pure_dict(state)

    def param_specs(self, sharding: Sharding, mesh: Any) -> dict[str, Any]:
        """PartitionSpec of every parameter, in the tree of `nnx.to_pure_dict(nnx.state(model))`."""
        sharding.check(self.config, mesh)
        found = nnx.state(self, nnx.Param)
        is_param = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
        specs = jax.tree.map(lambda v: sharding.spec(v.get_value().shape, v.axes, mesh), found, is_leaf=is_param)
        return nnx.to_pure_dict(specs)

    @classmethod
    def from_pretrained(
        cls,
        directory: Any,
        *,
        dtype: Any = None,
        param_dtype: Any = None,
        sharding: Sharding | None = None,
        remat: str | None = None,
        implementation: str | None = None,
    ) -> Qwen3_5:
        """Loads a Hugging Face checkpoint: config.json and *.safetensors, tensor by tensor, straight onto the devices.

        Args:
            directory: of the checkpoint.
            dtype: of activations; default: that of the checkpoint. param_dtype: of parameters; default: dtype.
            sharding, remat, implementation: as for the class.

        Raises:
            ValueError: another architecture, missing or unexpected tensors, damaged files; all in one message.
        """
        from ring_jax.models.qwen3_5 import pretrained

        config = Config.from_hf(directory)
        dtype = pretrained.checkpoint_dtype(directory) if dtype is None else dtype
        param_dtype = dtype if param_dtype is None else param_dtype
        options: dict[str, Any] = {"sharding": sharding, "remat": remat, "implementation": implementation}
        model = cls(config, rngs=None, dtype=dtype, param_dtype=param_dtype, **options)
        mesh = None if sharding is None else sharding.resolve_mesh()
        specs = None if sharding is None else model.param_specs(sharding, mesh)
        model.set_parameters(pretrained.load(directory, config, specs=specs, mesh=mesh, dtype=param_dtype))
        return model

    def save_pretrained(self, directory: Any, **options: Any) -> None:
        """Writes config.json and safetensors as transformers loads them; see `pretrained.save` for the options."""
        from ring_jax.models.qwen3_5 import pretrained

        pretrained.save(nnx.to_pure_dict(nnx.state(self, nnx.Param)), self.config, directory, **options)

    def set_parameters(self, values: dict[str, Any]) -> None:
        """Takes a tree of arrays as parameters: that of `nnx.to_pure_dict(nnx.state(model, nnx.Param))`, whole.

        Raises:
            ValueError: another tree, or other shapes.
        """
        own = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(self, nnx.Param)))[0]
        new = dict(jax.tree_util.tree_flatten_with_path(values)[0])
        wrong = [jax.tree_util.keystr(path) for path, x in own if path not in new or new[path].shape != x.shape]
        surplus = [jax.tree_util.keystr(path) for path in new.keys() - {path for path, _ in own}]
        if wrong or surplus:
            raise ValueError(f"parameters missing or of another shape: {wrong}; unexpected: {surplus}")
        nnx.update(self, nnx.State(values))


@functools.partial(jax.jit, static_argnums=0)
def _run_here(local: Static, *operands):
    """Without a mesh, jitted like the sharded form: eager calls would take seconds, operation by operation."""
    return local(*operands)


# -- around the pass -----------------------------------------------------------------------------


def _pad_end(tree, pad: int, value: int = 0):
    if pad == 0:
        return tree
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, pad)), constant_values=value), tree)


def _cut(out: Output, length: int, sharding: Sharding) -> Output:
    """Without the padding of the layout."""
    mesh = sharding.resolve_mesh()

    def cut(x, axis: int):
        if x is None or x.shape[axis] == length:
            return x
        if length % axis_size(mesh, sharding.sequence):  # no longer divides: Explicit meshes want that said
            spec: list[Any] = [None] * x.ndim
            spec[axis - 1] = sharding.batch
            x = place(x, mesh, P(*spec))
        return jax.lax.slice_in_dim(x, 0, length, axis=axis)

    logits = out.logits if out.logits is None or out.logits.ndim == 2 else cut(out.logits, 1)
    return dataclasses.replace(out, logits=logits, hidden=cut(out.hidden, 2))
