"""The model on a Hopper GPU in bfloat16: its kernels run, and it strays no further from float32 than transformers' own does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="needs torch (extra `parity`)")
pytest.importorskip("transformers", reason="needs transformers (extra `parity`)")

from ring_jax.gdn import Heads  # noqa: E402
from ring_jax.models.qwen3_5 import Config, Qwen3_5  # noqa: E402
from tests.models.qwen3_5 import hf  # noqa: E402
from tests.models.qwen3_5.test_parity_hf import divergence, text  # noqa: E402

pytestmark = pytest.mark.gpu
LENGTH, PROMPT = 320, 288  # the rest is decoded
SIZES = {"hidden_size": 256, "num_layers": 4, "layer_types": (), "num_heads": 4, "num_kv_heads": 2, "mlp_size": 512}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Few and narrow layers, with heads as published models have them."""
    preset = Config.preset("qwen3.5-4b")
    config = dataclasses.replace(preset, linear=Heads(4, 8, 128, 128), vocab_size=512, **SIZES)
    model = Qwen3_5(config, rngs=nnx.Rngs(0))
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokens = text(1, LENGTH)
    exact, theirs = (hf.prefill(hf.load(folder, dtype), tokens).logits for dtype in (torch.float32, torch.bfloat16))
    return folder, model, tokens, exact, theirs


def compiled(function, *arguments, kernels, **options):
    found = jax.jit(function, **options).lower(*arguments).compile()
    text = found.as_text()
    assert all(name in text for name in kernels), [name for name in kernels if name not in text]
    return found


def test_bfloat16_prefill_and_decode(checkpoint):
    _, model, tokens, exact, theirs = checkpoint
    graph, state = nnx.split(model)
    tokens = jnp.asarray(tokens[None])
    everything = lambda state, tokens: nnx.merge(graph, state)(tokens).logits[0]  # noqa: E731
    kernels = ("gated_delta_forward", "gated_delta_prepare", "gdn_convolution", "flash_attention_forward")
    found = np.asarray(compiled(everything, state, tokens, kernels=kernels)(state, tokens))
    assert divergence(exact, found) <= 1.5 * divergence(exact, theirs)

    begin = jax.jit(
        lambda state, tokens: nnx.merge(graph, state)(tokens, logits="last", cache_room=LENGTH - PROMPT).cache
    )
    cache = begin(state, tokens[:, :PROMPT])
    step = lambda state, token, cache: nnx.merge(graph, state).decode(token, cache)  # noqa: E731
    run = compiled(step, state, tokens[:, 0], cache, kernels=("gdn_decode",), donate_argnums=2)
    decoded = []
    for i in range(PROMPT, LENGTH):
        logits, cache = run(state, tokens[:, i], cache)
        decoded.append(np.asarray(logits[0]))
    both = divergence(exact[PROMPT:], np.stack(decoded)), divergence(exact[PROMPT:], theirs[PROMPT:])
    print(f"KL to float32, prefill {divergence(exact, found):.2e} ({divergence(exact, theirs):.2e}), decode {both}")
    assert both[0] <= 1.5 * both[1]


def test_float32_decode_continues_prefill(checkpoint):
    """With float32 the kernel that decodes keeps all digits that the prefill in XLA has."""
    folder, _, tokens, exact, _ = checkpoint
    with jax.default_matmul_precision("highest"):
        graph, state = nnx.split(Qwen3_5.from_pretrained(folder, dtype=jnp.float32))
        tokens = jnp.asarray(tokens[None])
        begin = lambda state, tokens: nnx.merge(graph, state)(tokens, logits="last", cache_room=4).cache  # noqa: E731
        cache = jax.jit(begin)(state, tokens[:, :PROMPT])
        step = lambda state, token, cache: nnx.merge(graph, state).decode(token, cache)  # noqa: E731
        run = compiled(step, state, tokens[:, 0], cache, kernels=("gdn_decode",))
        for i in range(PROMPT, PROMPT + 3):
            logits, cache = run(state, tokens[:, i], cache)
            np.testing.assert_allclose(logits[0], exact[i], rtol=0, atol=1e-4 * np.abs(exact[i]).max())
