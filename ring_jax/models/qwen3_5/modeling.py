"""Qwen3.5, Qwen3.5 MoE and Qwen3-Next.

    x = embed[tokens];   for each layer:  x += mixer(norm(x));  x += mlp(norm(x));   logits = norm(x) lm_head

where three of four mixers are gated delta rules, the fourth full attention. Layers are stacked in groups, one
repetition of that pattern each, and a scan walks the groups: a program has the size of one group whatever the depth.
In decode a loop walks them, so that nothing but reading the weights takes time.

The whole model is one `shard_map`, manual over every mesh axis. Tokens enter in natural order and are laid out once;
full attention runs as ring attention, runs of GDN layers under a partition of `ring_jax.gdn`; everything else acts on
tokens one by one. Here is what users call; `program.py` the same as functions of the parameters, `forward.py` one pass over all
layers, `pass_.py` how its tokens lie, `past.py` what came before them, `layers.py` the layers, written as for one device,
`collectives.py` what of them needs the mesh.

Sources: transformers' `modeling_qwen3_5.py`, `modeling_qwen3_5_moe.py`, `modeling_qwen3_next.py` for the mathematics;
Yang et al., Gated Delta Networks (arXiv:2412.06464); Qiu et al., Gated Attention (arXiv:2505.06708).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ring_jax import _repr
from ring_jax._checks import check_array, check_choice, check_dtype, check_instance, check_path
from ring_jax.flash.backends import check_options
from ring_jax.models.hf import Companions
from ring_jax.models.publish import located
from ring_jax.models.qwen3_5.cache import Cache
from ring_jax.models.qwen3_5.config import Config
from ring_jax.models.qwen3_5.forward import Output
from ring_jax.models.qwen3_5.init import initialise, param
from ring_jax.models.qwen3_5.layers import Group
from ring_jax.models.qwen3_5.past import Past
from ring_jax.models.qwen3_5.program import Program
from ring_jax.models.qwen3_5.sharding import REDUCED, VOCABULARY, WHOLE, Sharding

REMAT = ("full", "attention")


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
        past: Past | None = None,
        return_new: bool = False,
    ) -> Output:
        """One pass over new tokens, in natural order, of any length: whole texts, or what comes after a past.

        A prompt can be cut anywhere: `out = model(tokens, past=past, return_new=True); past = past.then(out.new)`.

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
            past: what came before each row's tokens, of any lengths, such as `Chunks`. Rows may then have no new token (`lengths` of
                0), which leaves them as they are. One token a row is decoded: it is the same on all context ranks.
            return_new: return what the pass leaves for those after it, its keys where it computed them.

        Raises:
            ValueError: arguments that do not fit together, or more tokens than the model has positions.
        """
        program, params = self.split()
        return program(
            params,
            tokens,
            past=past,
            lengths=lengths,
            segment_ids=segment_ids,
            logits=logits,
            cache_room=cache_room,
            return_hidden=return_hidden,
            return_stats=return_stats,
            return_new=return_new,
        )

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
        program, params = self.split()
        options: Any = {"lengths": lengths, "segment_ids": segment_ids, "weights": weights, "chunk": chunk}
        return program.loss(params, tokens, **options)

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
        program, params = self.split()
        return program.decode(params, tokens, cache)

    def split(self) -> tuple[Program, dict[str, Any]]:
        """(what is static in the model, its parameters): functions to jit, which take the parameters.

        Example:
            >>> from ring_jax.data import passkey
            >>> program, params = Qwen3_5.from_pretrained(passkey.MODEL).split()
            >>> jax.jit(program)(params, jnp.asarray([[72, 101]])).logits.shape
            (1, 2, 264)
        """
        return Program.of(self), nnx.to_pure_dict(nnx.state(self, nnx.Param))

    # -- parameters ------------------------------------------------------------------------------

    def param_specs(self, sharding: Sharding, mesh: Any) -> dict[str, Any]:
        """PartitionSpec of every parameter, in the tree of `nnx.to_pure_dict(nnx.state(model))`."""
        check_instance("sharding", sharding, Sharding, "a ring_jax.models.qwen3_5.Sharding")
        program, params = self.split()
        return dataclasses.replace(program, sharding=sharding).param_specs(params, mesh)

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
        from ring_jax.models.qwen3_5.hf import load

        directory = located(check_path("directory", directory))
        if directory.is_file():
            raise NotADirectoryError(f"{directory} is a file: expected a checkpoint directory, with config.json")
        config = Config.from_hf(directory)
        dtype = load.checkpoint_dtype(directory) if dtype is None else dtype
        param_dtype = dtype if param_dtype is None else param_dtype
        options: dict[str, Any] = {"sharding": sharding, "remat": remat, "implementation": implementation}
        model = cls(config, rngs=None, dtype=dtype, param_dtype=param_dtype, **options)
        mesh = None if sharding is None else sharding.resolve_mesh()
        specs = None if sharding is None else model.param_specs(sharding, mesh)
        model.set_parameters(load.load(directory, config, specs=specs, mesh=mesh, dtype=param_dtype, verify=verify))
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
        from ring_jax.models.qwen3_5.hf.save import save

        save(
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
