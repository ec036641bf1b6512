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
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from ring_jax import _repr
from ring_jax._checks import (
    Sizes,
    check_array,
    check_choice,
    check_count,
    check_dtype,
    check_flag,
    check_instance,
    check_path,
    concrete,
    to_int32,
)
from ring_jax._mesh import HashablePartial, axis_size, reshard_explicit, run_sharded
from ring_jax.flash.backends import check_options
from ring_jax.gdn import GDNCache, segments
from ring_jax.mask import check_segment_ids
from ring_jax.models.hf import Companions
from ring_jax.models.publish import located
from ring_jax.models.qwen3_5 import passes
from ring_jax.models.qwen3_5.cache import Cache, cache_specs
from ring_jax.models.qwen3_5.config import FULL, Config
from ring_jax.models.qwen3_5.initial import initialise, param
from ring_jax.models.qwen3_5.layers import Group
from ring_jax.models.qwen3_5.passes import Ask, Output
from ring_jax.models.qwen3_5.sharding import REDUCED, VOCABULARY, WHOLE, Sharding
from ring_jax.moe import RouterStats

REMAT = ("full", "attention")
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
        >>> from ring_jax.data import passkey
        >>> model = Qwen3_5.from_pretrained(passkey.MODEL)  # or Qwen3_5(Config.preset("qwen3.5-0.8b"), rngs=nnx.Rngs(0))
        >>> model(jnp.asarray([[72, 101, 108, 108]]), logits="last").logits.shape
        (1, 264)
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
        check_instance("config", config, Config, "a ring_jax.models.qwen3_5.Config")
        check_instance("rngs", rngs, nnx.Rngs, "flax.nnx.Rngs", optional=True)
        check_instance("sharding", sharding, Sharding, "a ring_jax.models.qwen3_5.Sharding", optional=True)
        check_choice("remat", remat, REMAT, optional=True)
        check_options(implementation, None)
        check_dtype("dtype", dtype)
        check_dtype("param_dtype", param_dtype, optional=True)
        self.config, self.dtype, self.sharding = config, jnp.dtype(dtype), sharding
        self.remat, self.implementation, self.companions = remat, implementation, Companions()
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
            tokens: int32 [B, S], of the vocabulary. Others raise where they are known; under jit all results of their
                row become NaN. Padding (beyond `lengths`, or of a negative segment id) may hold anything.
            lengths: int32 [B], real tokens of each row, the rest is padding on the right.
            segment_ids: int [B, S], packed documents as in `ring_jax.documents`. Not together with `lengths`.
            logits: "all", "last" (of each row's last real token) or "none".
            cache_room: return a cache with room for that many new tokens. Prompts of several lengths are padded on the right
                then (`lengths`): padding on the left, which only segment ids can say, leaves no cache.
            return_hidden: return what every layer hands on.
            return_stats: return the routers' statistics, for `ring_jax.moe.load_balance_loss`.

        Raises:
            ValueError: arguments that do not fit together, or more tokens than the model has positions.
        """
        if cache_room is not None:
            cache_room = check_count("cache_room", cache_room, 1)
        self._check_inputs(tokens, lengths, segment_ids, cache_room or 0)
        check_choice("logits", logits, LOGITS)
        check_flag("return_hidden", return_hidden)
        check_flag("return_stats", return_stats)
        if segment_ids is not None and (logits == "last" or cache_room is not None):
            raise ValueError(
                "packed documents (segment_ids) have no one last token: no logits='last', no cache_room; prompts of several lengths "
                "are padded on the right and say so by lengths="
            )
        if return_stats and self.config.experts is None:
            raise ValueError("return_stats: this model has no experts")
        tokens = jnp.asarray(tokens)
        lengths, segment_ids = (None if x is None else jnp.asarray(x) for x in (lengths, segment_ids))
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
            tokens, lengths, segment_ids: as in a call; no token predicts one of another document. Tokens are what is
                read and what is predicted, so -100 and other negative ids, by which some libraries mark labels to be
                skipped, are errors (NaN under jit): give such places a weight of zero.
            weights: float [B, S], weight of predicting the token at that place (place 0 predicts nothing).
            chunk: tokens of a rank whose logits exist at a time.
        """
        from ring_jax.models.qwen3_5.training import local_loss, next_tokens

        check_count("chunk", chunk, 1)
        self._check_inputs(tokens, lengths, segment_ids)
        if weights is not None:
            check_array("weights", weights, "B S", dict(zip("BS", tokens.shape, strict=True)), advice="as the tokens")
        arrays: list[Any] = [None if x is None else jnp.asarray(x) for x in (tokens, lengths, segment_ids, weights)]
        if self.sharding is not None:  # the next token may lie on another rank: tokens are small, so all have them
            arrays = [
                None if x is None else reshard_explicit(x, self.sharding.resolve_mesh(), P(self.sharding.batch))
                for x in arrays
            ]
        tokens, lengths, segment_ids, weights = arrays
        ask = Ask("none", None, False, self.config.experts is not None, tokens.shape[1], chunk)
        labels = next_tokens(tokens, lengths, segment_ids, weights)
        return self._run_prompt(local_loss, P(), ask, tokens, lengths, segment_ids, labels)

    def decode(self, tokens: Int[Array, " B"], cache: Cache) -> tuple[Float[Array, "B V"], Cache]:
        """One more token for each row.

        Args:
            tokens: int32 [B], the tokens after what the cache holds; of the vocabulary, as in a call.
            cache: of `model(..., cache_room=...)` or of the last step. Donate it under jit.

        Returns:
            float32 logits [B, V] of the token after, and the cache.

        Raises:
            ValueError: no room left, where the count is known; under jit the host has to count (a step beyond the room
            overwrites nothing, but its own token is forgotten).
        """
        self._check_cache(cache)
        check_array(
            "tokens", tokens, "B", {"B": cache.lengths.shape[0]}, kind="integer", advice="one a row of the cache"
        )
        self._check_has_parameters()
        self._check_vocabulary(tokens, None, None)
        tokens = jnp.asarray(tokens)
        known = concrete(cache.count)
        if known is not None and known >= cache.room:
            raise ValueError(
                f"the cache had room for {cache.room} new tokens and holds {known}: ask for more cache_room"
            )
        graph, params = self._split()
        if self.sharding is None:
            logits, new, states = _run_here(HashablePartial(passes.decode, (graph,)), params, tokens, cache)
        else:
            mesh, rows, caches = self.sharding.resolve_mesh(), P(self.sharding.batch), cache_specs(self.sharding)
            in_specs, out_specs = (
                (self.param_specs(self.sharding, mesh), rows, caches),
                (rows, caches.new_kv, caches.gdn),
            )
            operands = (params, tokens, cache)
            logits, new, states = run_sharded(
                HashablePartial(passes.decode, (graph,)), mesh, in_specs, out_specs, operands
            )
        return logits, dataclasses.replace(cache, new_kv=new, gdn=states, count=cache.count + 1)

    def _run_prompt(self, local, out_specs, ask: Ask, tokens, lengths, segment_ids, labels):
        """`local` on every rank's share of the prompts, laid out by itself."""
        length = tokens.shape[1]
        if lengths is not None:
            lengths = to_int32(jnp.clip(lengths, 0, length))  # traced ones: no row is longer than the tokens
        graph, params = self._split()
        if self.sharding is None:
            return _run_here(HashablePartial(local, (graph, ask)), params, tokens, lengths, segment_ids, labels)
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
        return run_sharded(HashablePartial(local, (graph, ask)), mesh, in_specs, out_specs, operands)

    def _check_inputs(self, tokens, lengths, segment_ids, room: int = 0) -> None:
        """Raises for shapes and values that do not fit; values only where they are known now."""
        sizes = Sizes()
        check_array("tokens", tokens, "B S", sizes, kind="integer")
        if 0 in tokens.shape:
            raise ValueError(f"tokens must hold at least one token, got shape {tokens.shape}")
        batch, length = tokens.shape
        if length + room > self.config.max_positions:
            raise ValueError(
                f"{length} tokens and room for {room} more exceed the model's {self.config.max_positions} positions"
            )
        if lengths is not None and segment_ids is not None:
            raise ValueError("give lengths or segment_ids, not both: padding has negative segment ids")
        if segment_ids is not None:
            check_array("segment_ids", segment_ids, "B S", sizes, kind="signed", advice="as the tokens")
            check_segment_ids(segment_ids)
        if lengths is not None:
            check_array("lengths", lengths, "B", sizes, kind="integer")
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
        self._check_has_parameters()
        self._check_vocabulary(tokens, lengths, segment_ids)

    def _check_has_parameters(self) -> None:
        if isinstance(self.embed.get_value(), jax.ShapeDtypeStruct):
            raise ValueError(
                "this model has no parameters yet (rngs=None): load some with set_parameters or from_pretrained"
            )

    def _check_vocabulary(self, tokens, lengths, segment_ids) -> None:
        """Raises for ids that are known now and outside of the vocabulary; `passes.encode` makes NaN of the others."""
        ids = concrete(tokens)
        if ids is None:
            return
        outside = (ids < 0) | (ids >= self.config.vocab_size)
        if not outside.any():
            return
        known_lengths, known_ids = concrete(lengths), concrete(segment_ids)
        if (lengths is not None and known_lengths is None) or (segment_ids is not None and known_ids is None):
            return  # which tokens are padding is not known yet
        if known_lengths is not None:
            outside &= np.arange(ids.shape[1]) < known_lengths[:, None]
        if known_ids is not None:
            outside &= known_ids >= 0
        if outside.any():
            raise ValueError(
                f"tokens must be in [0, {self.config.vocab_size - 1}], the model's vocabulary, got {ids[outside][0]}: do "
                "tokenizer and checkpoint belong together? Padding is marked by lengths or negative segment_ids, and "
                "what is not to be learned by weights"
            )

    def _check_cache(self, cache: Cache) -> None:
        check_instance("cache", cache, Cache, "a ring_jax.models.qwen3_5.Cache, of model(..., cache_room=...)")
        config = self.config
        kinds = 2 * config.layer_types.count(FULL)  # keys and values
        sizes = {"M": kinds, "K": config.num_kv_heads, "H": config.head_dim}
        check_array("cache.prompt_kv", cache.prompt_kv, "M B S K H", sizes, advice="a cache belongs to its model")
        check_array("cache.new_kv", cache.new_kv, "M B R K H", sizes)
        check_array("cache.lengths", cache.lengths, "B", sizes, kind="integer")
        check_array("cache.count", cache.count, "", kind="integer")
        check_instance("cache.gdn", cache.gdn, GDNCache, "a ring_jax.gdn.GDNCache")
        for name in ("state", "tail"):
            check_array(f"cache.gdn.{name}", getattr(cache.gdn, name))

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
        check_instance("sharding", sharding, Sharding, "a ring_jax.models.qwen3_5.Sharding")
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
        verify: bool = True,
    ) -> Qwen3_5:
        """Loads a Hugging Face checkpoint: config.json and *.safetensors, tensor by tensor, straight onto the devices.

        The files of a tokenizer that lie there are kept with the model, for `save_pretrained`.

        Args:
            directory: of the checkpoint.
            dtype: of activations; default: that of the checkpoint. param_dtype: of parameters; default: dtype.
            sharding, remat, implementation: as for the class.
            verify: check the weights against the checksums that `save_pretrained` writes; other files have none.

        Raises:
            ValueError: another architecture, missing or unexpected tensors (all in one message), damaged files.
            FileNotFoundError: no checkpoint there.
        """
        from ring_jax.models.qwen3_5 import pretrained

        directory = located(check_path("directory", directory))
        if directory.is_file():
            raise NotADirectoryError(f"{directory} is a file: expected a checkpoint directory, with config.json")
        config = Config.from_hf(directory)
        dtype = pretrained.checkpoint_dtype(directory) if dtype is None else dtype
        param_dtype = dtype if param_dtype is None else param_dtype
        options: dict[str, Any] = {"sharding": sharding, "remat": remat, "implementation": implementation}
        model = cls(config, rngs=None, dtype=dtype, param_dtype=param_dtype, **options)
        mesh = None if sharding is None else sharding.resolve_mesh()
        specs = None if sharding is None else model.param_specs(sharding, mesh)
        model.set_parameters(
            pretrained.load(directory, config, specs=specs, mesh=mesh, dtype=param_dtype, verify=verify)
        )
        model.companions = Companions.of(directory)
        return model

    def save_pretrained(
        self,
        directory: Any,
        *,
        tokenizer_from: Any = None,
        overwrite: bool = False,
        max_shard_size: int = 4 * 10**9,
    ) -> None:
        """Writes config.json, safetensors with checksums, and the tokenizer, as transformers loads them.

        Whole or not at all: an interrupted save leaves what was there. With several processes all must call this.

        Args:
            directory: to make, or to replace.
            tokenizer_from: a directory whose tokenizer, chat template and generation config are copied. Default: those
                that lay beside the weights in `from_pretrained`; a model made otherwise has none, and text then needs
                a tokenizer from elsewhere.
            overwrite: replace the checkpoint that is there; other files beside it stay.
            max_shard_size: bytes in one file; a larger model gets several and an index.

        Raises:
            FileExistsError: a checkpoint is there and `overwrite` is not set, or other files and no checkpoint.
            FileNotFoundError: no tokenizer in `tokenizer_from`.

        Example:
            >>> import pathlib, tempfile
            >>> from ring_jax.data import passkey
            >>> directory = pathlib.Path(tempfile.mkdtemp()) / "tuned"
            >>> _ = Qwen3_5.from_pretrained(passkey.MODEL).save_pretrained(directory)
            >>> (directory / "tokenizer.json").exists() or (directory / "tokenizer_config.json").exists()
            True
        """
        from ring_jax.models.qwen3_5 import pretrained

        pretrained.save(
            nnx.to_pure_dict(nnx.state(self, nnx.Param)),
            self.config,
            directory,
            max_shard_size=max_shard_size,
            tokenizer_from=tokenizer_from,
            overwrite=overwrite,
            companions=self.companions,
        )

    def set_parameters(self, values: dict[str, Any]) -> None:
        """Takes a tree of arrays as parameters: that of `nnx.to_pure_dict(nnx.state(model, nnx.Param))`, whole.

        Raises:
            ValueError: another tree, or other shapes.
        """
        check_instance("values", values, dict, "a dict of parameters, as nnx.to_pure_dict(nnx.state(model)) gives it")
        for path, x in jax.tree_util.tree_flatten_with_path(values)[0]:
            check_array(f"values{jax.tree_util.keystr(path)}", x)
        own = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(self, nnx.Param)))[0]
        new = dict(jax.tree_util.tree_flatten_with_path(values)[0])
        wrong = [jax.tree_util.keystr(path) for path, x in own if path not in new or new[path].shape != x.shape]
        surplus = [jax.tree_util.keystr(path) for path in new.keys() - {path for path, _ in own}]
        if wrong or surplus:
            raise ValueError(f"parameters missing or of another shape: {wrong}; unexpected: {surplus}")
        nnx.update(self, nnx.State(values))


@functools.partial(jax.jit, static_argnums=0)
def _run_here(local: HashablePartial, *operands):
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
            x = reshard_explicit(x, mesh, P(*spec))
        return jax.lax.slice_in_dim(x, 0, length, axis=axis)

    logits = out.logits if out.logits is None or out.logits.ndim == 2 else cut(out.logits, 1)
    return dataclasses.replace(out, logits=logits, hidden=cut(out.hidden, 2))
