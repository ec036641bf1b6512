"""Qwen3.5, Qwen3.5 MoE and Qwen3-Next, read top to bottom.

    x = embed[tokens];   for each layer:  x += mixer(norm(x));  x += mlp(norm(x));   logits = norm(x) lm_head

where three of four mixers are gated delta rules, the fourth full attention. Layers are stacked in groups, one
repetition of that pattern each, and a scan walks the groups: a program has the size of one group whatever the depth.

The whole model is one `shard_map`, manual over every mesh axis. Tokens enter in natural order and are laid out once;
full attention runs as ring attention, runs of GDN layers as `ring_jax.gdn.run` spreads them; everything else acts on
tokens one by one. What of this needs the mesh is in `local.py`; layers here are written as for one device.

Sources: transformers' `modeling_qwen3_5.py`, `modeling_qwen3_5_moe.py`, `modeling_qwen3_next.py` for the mathematics;
Yang et al., Gated Delta Networks (arXiv:2412.06464); Qiu et al., Gated Attention (arXiv:2505.06708).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from ring_jax import gdn
from ring_jax._checks import concrete
from ring_jax._vma import pcast_to
from ring_jax.context.parallel import Static, axis_size, place, run_sharded
from ring_jax.context.shard import axis_names
from ring_jax.gdn import segments
from ring_jax.gdn.checks import widened
from ring_jax.gdn.mixer import MixerWeights, mix, mix_projected
from ring_jax.mask import Mask, causal, documents
from ring_jax.mask import lengths as lengths_mask
from ring_jax.models.qwen3_5.cache import Cache, append, cache_specs
from ring_jax.models.qwen3_5.config import FULL, LINEAR, Config
from ring_jax.models.qwen3_5.initial import initialise, param, stacked
from ring_jax.models.qwen3_5.local import Local, Prompt, Step
from ring_jax.models.qwen3_5.sharding import (
    EXPERTS,
    FEATURES,
    HEADS,
    KEY_VALUE_HEADS,
    LINEAR_HEADS,
    REDUCED,
    REDUCED_FEATURES,
    REDUCED_HEADS,
    VOCABULARY,
    WHOLE,
    Sharding,
)
from ring_jax.moe import MoEWeights, RouterStats, moe
from ring_jax.nn.gdn import gated_rms_norm
from ring_jax.nn.rope import apply_rope

REMAT = (None, "full", "attention")
LOGITS = ("all", "last", "none")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What a call returns.

    Fields:
        logits: float32, [B, S, V] of all positions, [B, V] of each row's last one, or None.
        cache: to decode from, if it was asked for.
        hidden: [layers, B, S, D], what each layer hands on (before the final norm), if it was asked for.
        stats: of the routers, summed over tokens and layers, if it was asked for.
    """

    logits: Float[Array, "B S V"] | Float[Array, "B V"] | None
    cache: Cache | None = None
    hidden: Float[Array, "layers B S D"] | None = None
    stats: RouterStats | None = None


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
        out = self._run_prompt(_forward, specs, ask, tokens, lengths, segment_ids, None)
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
            logits, new, states = _run_here(Static(_decode, (graph,)), params, tokens, cache)
        else:
            mesh, rows, caches = self.sharding.resolve_mesh(), P(self.sharding.batch), cache_specs(self.sharding)
            in_specs, out_specs = (self.param_specs(self.sharding, mesh), rows, caches), (rows, caches.new, caches.gdn)
            operands = (params, tokens, cache)
            logits, new, states = run_sharded(Static(_decode, (graph,)), mesh, in_specs, out_specs, operands)
        return logits, dataclasses.replace(cache, new=new, gdn=states, count=cache.count + 1)

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


@dataclasses.dataclass(frozen=True)
class Ask:
    """What a pass over prompts is asked for; static."""

    logits: str
    cache_room: int | None
    hidden: bool
    stats: bool
    seq_len: int
    chunk: int = 0


class Group(nnx.Module):
    """The layers of all groups, parameters stacked along a leading axis that the scan walks."""

    def __init__(self, config: Config, dtype: Any):
        self.layers = nnx.List([Layer(config, kind, dtype) for kind in config.layer_types[: config.period]])


class Layer(nnx.Module):
    """x += mixer(norm(x));  x += mlp(norm(x))."""

    def __init__(self, config: Config, kind: str, dtype: Any):
        make = functools.partial(stacked, config.groups)
        width = config.hidden_size
        self.config, self.kind = config, kind
        self.input_norm = make((width,), (WHOLE,), "zeros", dtype)
        self.mixer = (FullAttention if kind == FULL else GatedDeltaNet)(config, make, dtype)
        self.post_norm = make((width,), (WHOLE,), "zeros", dtype)
        self.mlp = (MLP if config.experts is None else SparseMLP)(config, make, dtype)

    def __call__(self, x: Array, mixer_cache: Any, here: Local, spread: Any, valid: Array | None):
        """(x, what the mixer leaves in the cache, router statistics or None)."""
        config = self.config
        mixed, left = self.mixer(norm(x, self.input_norm, config), mixer_cache, here, spread)
        x = x + mixed
        y, stats = self.mlp(norm(x, self.post_norm, config), here, valid)
        return x + y, left, stats


class FullAttention(nnx.Module):
    """Grouped-query attention with q/k norm, partial RoPE and an output gate."""

    def __init__(self, config: Config, make: Any, dtype: Any):
        width, size = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_heads * size, config.num_kv_heads * size
        self.config = config
        self.q = make((width, 2 * heads), (REDUCED, HEADS), "rows", dtype)  # for each head: query, gate
        self.k = make((width, kv_heads), (REDUCED, KEY_VALUE_HEADS), "rows", dtype)
        self.v = make((width, kv_heads), (REDUCED, KEY_VALUE_HEADS), "rows", dtype)
        self.o = make((heads, width), (REDUCED_HEADS, WHOLE), "rows", dtype)
        self.q_norm = make((size,), (WHOLE,), "zeros", dtype)
        self.k_norm = make((size,), (WHOLE,), "zeros", dtype)

    def __call__(self, x_btd: Array, cache: Any, here: Any, spread: None = None) -> tuple[Array, Array]:
        config, size = self.config, self.config.head_dim
        split = (*x_btd.shape[:2], -1, size)
        q, gate = jnp.split(here.product(x_btd, self.q[...]).reshape(*x_btd.shape[:2], -1, 2 * size), 2, axis=-1)
        k = here.product(x_btd, self.k[...]).reshape(split)
        v = here.product(x_btd, self.v[...]).reshape(split)
        rope = functools.partial(apply_rope, theta=config.rope_theta, rotary_fraction=config.rotary_fraction)
        q = rope(norm(q, self.q_norm, config), here.positions)
        k = rope(norm(k, self.k_norm, config), here.positions)
        out_btnh, left = here.attend(q, k, v, cache)
        gated = (out_btnh * jax.nn.sigmoid(gate)).reshape(*x_btd.shape[:2], -1)
        return here.sum_tensor(here.product(gated, self.o[...])), left


class GatedDeltaNet(nnx.Module):
    """The gated delta rule behind a short convolution, before a gated norm; `ring_jax.gdn.mixer` has the formulas."""

    def __init__(self, config: Config, make: Any, dtype: Any):
        width, heads = config.hidden_size, config.linear
        self.config = config
        keys, _, values = heads.parts
        n, taps = heads.value_heads, config.conv_width
        self.q = make((width, keys), (REDUCED, LINEAR_HEADS), "rows", dtype)
        self.k = make((width, keys), (REDUCED, LINEAR_HEADS), "rows", dtype)
        self.v = make((width, values), (REDUCED, LINEAR_HEADS), "rows", dtype)
        self.conv_q = make((taps, keys), (WHOLE, LINEAR_HEADS), "rows", dtype)
        self.conv_k = make((taps, keys), (WHOLE, LINEAR_HEADS), "rows", dtype)
        self.conv_v = make((taps, values), (WHOLE, LINEAR_HEADS), "rows", dtype)
        self.z = make((width, values), (REDUCED, LINEAR_HEADS), "rows", dtype)
        self.b = make((width, n), (REDUCED, LINEAR_HEADS), "rows", dtype)
        self.a = make((width, n), (REDUCED, LINEAR_HEADS), "rows", dtype)
        self.A_log = make((n,), (LINEAR_HEADS,), "decay", jnp.float32)
        self.dt_bias = make((n,), (LINEAR_HEADS,), "time_step", dtype)
        self.norm = make((heads.value_size,), (WHOLE,), "ones", jnp.float32)
        self.o = make((values, width), (REDUCED_HEADS, WHOLE), "rows", dtype)

    def __call__(self, x_btd: Array, cache: Any, here: Local, spread: gdn.Spread) -> tuple[Array, gdn.GDNCache]:
        width, heads = x_btd.shape[-1], self.config.linear.share(here.tensor_ranks)
        kernels = (self.q, self.k, self.v), (self.b, self.a)
        conv = jnp.concatenate([self.conv_q[...], self.conv_k[...], self.conv_v[...]], axis=-1)
        rest: dict[str, Any] = {"conv": conv, "a_log": self.A_log[...], "dt_bias": self.dt_bias[...], "heads": heads}
        if isinstance(here, Step):
            mixed, ba = (jnp.concatenate([here.product(x_btd, w[...]) for w in ws], axis=-1) for ws in kernels)
            out, cache = mix_projected(MixerWeights((), (), **rest), mixed, ba, cache, spread)
        else:
            qkv, split_ba = (tuple(here.weight(w[...], 0, width, x_btd) for w in ws) for ws in kernels)
            out, cache = mix(MixerWeights(qkv, split_ba, **rest), x_btd, cache, spread)
        gate = here.product(x_btd, self.z[...]).reshape(out.shape)
        out = gated_rms_norm(out, gate, self.norm[...], self.config.norm_epsilon)
        y = here.sum_tensor(here.product(out.reshape(*x_btd.shape[:2], -1), self.o[...]))
        return y, cache


class MLP(nnx.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, config: Config, make: Any, dtype: Any):
        width, size = config.hidden_size, config.mlp_size
        self.gate_up = make((width, 2, size), (REDUCED, WHOLE, FEATURES), "pairs", dtype)
        self.down = make((size, width), (REDUCED_FEATURES, WHOLE), "rows", dtype)

    def __call__(self, x_btd: Array, here: Local, valid: Array | None) -> tuple[Array, None]:
        return here.sum_tensor(_swiglu(x_btd, self.gate_up[...], self.down[...], here)), None


class SparseMLP(nnx.Module):
    """Routed experts and a gated shared one."""

    def __init__(self, config: Config, make: Any, dtype: Any):
        width, experts = config.hidden_size, config.experts
        assert experts is not None
        self.experts = experts
        self.router = make((width, experts.count), (REDUCED, WHOLE), "rows", dtype)
        gate_up = (experts.count, width, 2, experts.size)
        self.gate_up = make(gate_up, (EXPERTS, REDUCED, WHOLE, FEATURES), "pairs", dtype)
        self.down = make((experts.count, experts.size, width), (EXPERTS, REDUCED_FEATURES, WHOLE), "rows", dtype)
        self.shared_gate_up = make((width, 2, experts.shared_size), (REDUCED, WHOLE, FEATURES), "pairs", dtype)
        self.shared_down = make((experts.shared_size, width), (REDUCED_FEATURES, WHOLE), "rows", dtype)
        self.shared_gate = make((width,), (WHOLE,), "vector", dtype)

    def __call__(self, x_btd: Array, here: Local, valid: Array | None) -> tuple[Array, RouterStats]:
        width, experts, dtype = x_btd.shape[-1], self.experts, x_btd.dtype
        gate_up = here.weight(self.gate_up[...].astype(dtype), 1, width, x_btd, expert=True)
        down = here.weight(self.down[...].astype(dtype), 1, gate_up.shape[-1], x_btd, expert=True)
        weights = MoEWeights(here.weight(self.router[...].astype(dtype), 0, width, x_btd), gate_up, down)
        routed, stats = moe(
            x_btd.reshape(-1, width),
            weights,
            top_k=experts.per_token,
            renormalize=experts.renormalize,
            expert_axis=here.expert,
            tokens_spread=here.spread_over(here.expert),
            tensor_axis=here.tensor,
            valid=None if valid is None else valid.reshape(-1),
        )
        shared = here.sum_tensor(_swiglu(x_btd, self.shared_gate_up[...], self.shared_down[...], here))
        gate = jax.nn.sigmoid(jnp.einsum("btd,d->bt", x_btd, self.shared_gate[...].astype(dtype)))[..., None]
        return routed.reshape(x_btd.shape) + gate * shared, stats


def _swiglu(x, gate_up, down, here: Local):
    gate, up = jnp.split(here.product(x, gate_up.reshape(gate_up.shape[0], -1)), 2, axis=-1)
    return here.product(jax.nn.silu(gate) * up, down)


def norm(x, weight, config: Config):
    """x / rms(x) * (1 + weight), in float32."""
    wide = widened(x)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + config.norm_epsilon)
    return (wide * (1 + weight[...].astype(wide.dtype))).astype(x.dtype)


# -- one pass, inside the shard_map (or without a mesh) ------------------------------------------


def _forward(params, tokens, lengths, segment_ids, labels, graph, ask: Ask) -> Output:
    """A pass over the prompts whose tokens are here, contiguous [B, S / C]; results in natural order again."""
    del labels
    model = nnx.merge(graph, nnx.State(params))
    here, x, left = encode(model, tokens, lengths, segment_ids, ask)
    logits = cache = hidden = None
    if ask.logits == "all":
        logits = _logits(model, here, _natural(x, here))
    elif ask.logits == "last":
        last = jnp.full(tokens.shape[:1], ask.seq_len - 1) if lengths is None else lengths - 1
        at_last = here.order == last[:, None]
        x = jnp.sum(jnp.where(at_last[..., None], x, jnp.zeros_like(x)), axis=1)
        logits = here.whole_vocabulary(_logits(model, here, here.sum_context(x)))
    if ask.cache_room is not None:
        ranks = 1 if model.sharding is None else model.sharding.context.ranks()
        G, L, two, B, _, K, H = left.keys.shape
        new = jnp.zeros((G, L, two, B, -(-ask.cache_room // ranks), K, H), left.keys.dtype)
        lengths = jnp.full(B, ask.seq_len, jnp.int32) if lengths is None else lengths.astype(jnp.int32)
        (lengths,) = pcast_to((lengths,), here.token_axes(rows_only=True))
        new = pcast_to(new, here.token_axes() + axis_names(here.tensor))
        cache = Cache(left.keys, new, left.states, lengths, jnp.zeros((), jnp.int32))
    if ask.hidden:
        hidden = _natural(left.hidden, here, seq_axis=2)
    return Output(logits, cache, hidden, left.stats)


def _decode(params, tokens, cache: Cache, graph):
    """One token for each row, on this rank's shards of the cache: logits, and what of the cache is new. The prompt's keys
    are not handed through: that would copy them at every step."""
    model = nnx.merge(graph, nnx.State(params))
    sharding, shard, rank, ranks = model.sharding, None, 0, 1
    if sharding is not None:
        ranks = sharding.context.ranks()
        shard = sharding.context.shard(cache.prompt.shape[4] * ranks)
        rank = shard.rank()
    here = Step(sharding, cache.positions[:, None], shard, cache.lengths, cache.count)
    x = _embed(model, here, tokens[:, None])
    x, left = _walk(model, x, here, (cache.prompt, cache.new, cache.gdn), hidden=False, stats=False)
    logits = here.whole_vocabulary(_logits(model, here, x[:, 0]))
    return logits, append(cache, left.keys, rank, ranks), left.states


def encode(model: Qwen3_5, tokens, lengths, segment_ids, ask: Ask):
    """(how the tokens lie, the last layer's output [B, T here, D] in layout order, what the layers leave)."""
    tokens, here = _lay_out(model, tokens, lengths, segment_ids, ask)
    x, left = _walk(model, _embed(model, here, tokens), here, None, hidden=ask.hidden, stats=ask.stats)
    return here, x, left


def _lay_out(model: Qwen3_5, tokens, lengths, segment_ids, ask: Ask):
    """The tokens in the order of the layout, and all that depends on it: once for all layers."""
    sharding, (batch, length) = model.sharding, tokens.shape
    mask: Mask = causal()
    if lengths is not None:
        mask &= lengths_mask(lengths, lengths)
    if segment_ids is not None:
        mask &= documents(segment_ids=segment_ids)
    if sharding is None:
        order = jnp.arange(length, dtype=jnp.int32)
        start, end = mask.interval(order, q_len=length, kv_len=length)
        resolved: Any = tuple(jnp.broadcast_to(x, tokens.shape) for x in (start, end))
        padded = False
    else:
        context = sharding.context
        tokens = context.to_layout(tokens)
        shard = context.shard(length * context.ranks())
        order, resolved, padded = shard.positions(), context.resolve(mask, ask.seq_len), shard.length != ask.seq_len
        start = resolved.start
    positions, ids = order, None
    if segment_ids is not None:
        ids = jnp.take(segment_ids, order, axis=1).astype(jnp.int32)
        positions = jnp.maximum(order - start, 0)  # each document begins at 0
    elif lengths is not None or padded:
        limit = jnp.full((batch, 1), ask.seq_len) if lengths is None else lengths[:, None]
        ids = jnp.where(order < limit, 0, segments.PADDING)
    return tokens, Prompt(sharding, positions, order, resolved, ids, model.implementation)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Left:
    """What the layers leave behind, stacked over groups: packed keys and values, GDN caches, hidden states
    [layers, B, T, D], router statistics of all."""

    keys: Array
    states: gdn.GDNCache
    hidden: Array | None
    stats: RouterStats | None


def _walk(model: Qwen3_5, x, here: Any, caches, *, hidden: bool, stats: bool):
    """All layers. caches: (prompt keys, new keys, GDN caches), stacked over groups; None to begin."""
    config = model.config
    graph, groups = nnx.split(model.groups)

    def group(x, operands):
        values, caches = operands
        layers = list(nnx.merge(graph, nnx.State(values)).layers)
        keys, states, hiddens, sums = [], [], [], []
        for kind, run in itertools.groupby(layers, key=lambda layer: layer.kind):
            if kind == LINEAR:
                x, left, found, total = _linear_run(list(run), x, caches, len(states), here, hidden, stats)
                states += left
                hiddens += found
                sums += total
                continue
            for layer in run:
                own = None if caches is None else (caches[0][len(keys)], caches[1][len(keys)])
                x, left, routed = layer(x, own, here, None, here.valid)
                keys.append(left)
                hiddens += [x] if hidden else []
                sums += [here.sum_context(routed)] if stats else []
        stack = lambda *leaves: jnp.stack(leaves)  # noqa: E731
        return x, Left(
            jnp.stack(keys),
            jax.tree.map(stack, *states),
            jnp.stack(hiddens) if hidden else None,
            jax.tree.map(lambda *s: sum(s[1:], s[0]), *sums) if stats else None,
        )

    body = group
    if model.remat is not None:
        saved = ("ring_jax_out", "ring_jax_lse") if model.remat == "attention" else ()
        body = jax.checkpoint(group, policy=jax.checkpoint_policies.save_only_these_names(*saved), prevent_cse=False)
    x, left = jax.lax.scan(body, x, (nnx.to_pure_dict(groups), caches))
    hiddens = None if left.hidden is None else left.hidden.reshape(config.num_layers, *left.hidden.shape[2:])
    total = None if left.stats is None else here.sum_rows(jax.tree.map(lambda s: s.sum(axis=0), left.stats))
    return x, Left(left.keys, left.states, hiddens, total)


def _linear_run(layers: list[Layer], x, caches, first: int, here: Any, hidden: bool, stats: bool):
    """Neighbouring GDN layers, spread over the ranks as one run."""
    config = layers[0].config
    own = None
    if caches is not None:
        own = [jax.tree.map(lambda c, i=first + i: c[i], caches[2]) for i in range(len(layers))]

    def run(x, caches, spread):
        valid = None if spread.segment_ids is None else spread.segment_ids >= 0
        left, hiddens, sums = [], [], []
        for i, layer in enumerate(layers):
            x, cache, routed = layer(x, None if caches is None else caches[i], here, spread, valid)
            left.append(cache)
            hiddens += [x] if hidden else []
            sums += [routed] if stats else []
        return (x, hiddens), left, sums

    heads = config.linear.share(here.tensor_ranks)
    shape = gdn.GDNShape(0, 0, heads, config.hidden_size, config.conv_width, len(layers), x.dtype.itemsize)
    (x, hiddens), left, sums = here.run(run, x, own, shape)
    return x, left, hiddens, sums


def _embed(model: Qwen3_5, here: Any, tokens):
    x = here.rows(model.embed[...], tokens, model.config.hidden_size).astype(model.dtype)
    return pcast_to(x, here.token_axes())


def head(model: Qwen3_5):
    return model.embed[...].T if model.lm_head is None else model.lm_head[...]


def _logits(model: Qwen3_5, here: Local, x):
    return here.product(norm(x, model.final_norm, model.config), head(model), jnp.float32)


def _natural(x, here: Local, seq_axis: int = 1):
    return x if here.sharding is None else here.sharding.context.from_layout(x, seq_axis=seq_axis)


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
