"""``ring-jax demo``: a small byte-level model trains with ring attention on a text, then reads a long stretch of it.

Training and the long pass run over all devices. The long pass is checked against the same weights on one device.
"""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np

from ring_jax.cli import CommandError, need, use_all_devices
from ring_jax.commands.balance import Balance, causal_balance, plot
from ring_jax.commands.collectives import count_collectives
from ring_jax.layout import Layout

MAX_TOKENS = 16_384
MIN_TOKENS = 256
STEPS = 30
BATCH = 4
WINDOW = 512
PLOT = Path("ring-jax-demo.png")
# Sums in another order: float32 logits of this model agree to about 1e-5.
TOLERANCE = 1e-3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", nargs="?", type=Path, metavar="FILE", help="text to train on (default: Python's own help)"
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=MAX_TOKENS,
        metavar="N",
        help=f"bytes of the long pass (default: {MAX_TOKENS})",
    )
    parser.add_argument(
        "--plot", type=Path, default=PLOT, metavar="PNG", help=f"where the picture of the work balance goes ({PLOT})"
    )


def run(args: argparse.Namespace) -> int:
    need("matplotlib", "optax", "tqdm")
    if args.max_tokens < MIN_TOKENS:
        raise CommandError(f"--max-tokens must be at least {MIN_TOKENS}, got {args.max_tokens}")
    if not args.plot.resolve().parent.is_dir():
        raise CommandError(f"cannot write {args.plot}: {args.plot.resolve().parent} is not a folder")
    name, text = read_text(args.file)
    use_all_devices()

    import jax
    from tqdm import tqdm

    devices = jax.devices()
    emulated = " (emulated on one CPU)" if devices[0].platform == "cpu" and len(devices) > 1 else ""
    print(f"text      {name}: {len(text):,} bytes")
    print(f"devices   {len(devices)} x {devices[0].device_kind}{emulated}")

    total = STEPS + 2 + 2
    with tqdm(total=total, desc="compile", leave=False, disable=None) as bar:
        setup = Setup.create(devices)
        losses = train(setup, text, bar)
        result = long_pass(setup, text[: args.max_tokens], bar)

    after = np.mean(losses.values[-3:])
    shape = f"{losses.batch} x {losses.window:,} bytes"
    print(f"training  {STEPS} steps of {shape} with ring attention in {losses.seconds:.1f} s")
    print(f"          loss {losses.values[0]:.3f} before, {after:.3f} after (nats per byte)")
    print(f"long pass {result.tokens:,} bytes, {setup.context.layout}, loss {result.loss:.3f}")
    print(f"          {result.tokens / result.seconds:,.0f} tokens/s in one pass of {result.seconds:.2f} s")
    print(
        f"          the unsharded model differs by at most {result.difference:.1e} (logits up to {result.largest:.1f})"
    )
    print(f"          collectives in the compiled program: {_counted(result.collectives)}")
    balances = work_balance(result.tokens, len(devices))
    print_balances(balances)
    plot(balances, f"Causal attention over {result.tokens:,} tokens on {len(devices)} ranks", args.plot)
    print(f"picture   {args.plot}")
    if not result.difference <= TOLERANCE * max(1.0, result.largest):
        print(f"FAILED: sharded and unsharded model differ by more than {TOLERANCE:g} of the largest logit")
        return 1
    return 0


def read_text(file: Path | None) -> tuple[str, np.ndarray]:
    """The bytes to train on, uint8 [S], and what to call them."""
    if file is None:
        # The help texts of the language: about half a megabyte of English that every Python carries.
        from pydoc_data.topics import topics

        name, raw = "Python's help topics", "\n\n".join(topics[key] for key in sorted(topics)).encode()
    else:
        name = str(file)
        try:
            raw = file.read_bytes()
        except OSError as error:
            raise CommandError(f"cannot read {file}: {error.strerror}") from error
    if len(raw) < MIN_TOKENS:
        raise CommandError(f"{name} has {len(raw)} bytes; the demo needs at least {MIN_TOKENS}")
    return name, np.frombuffer(raw, np.uint8)


@dataclasses.dataclass(frozen=True)
class Setup:
    """The mesh, how the sequence lies on it, and the model."""

    mesh: Any
    context: Any
    model: Any

    @classmethod
    def create(cls, devices: Any) -> "Setup":
        import jax
        from flax import nnx

        import ring_jax
        from ring_jax.commands.demo_model import ByteModel

        mesh = jax.sharding.Mesh(np.asarray(devices), ("context",))
        context = ring_jax.ContextParallel("context", layout=ring_jax.Zigzag(), mesh=mesh, strategy="ring")
        model = ByteModel(context=context, rngs=nnx.Rngs(0))
        return cls(mesh, context, model)

    def replicate(self, module: Any) -> None:
        """Puts every array of a module on all devices; left on one, the first step would compile twice."""
        import jax
        from flax import nnx

        nnx.update(module, jax.device_put(nnx.state(module), jax.NamedSharding(self.mesh, jax.P())))

    def lay_out(self, tokens: np.ndarray) -> tuple[Any, Any, Any]:
        """Bytes, next bytes (int32) and weights (float32, 0 where none follows), [B, T] in the context's layout."""
        import jax.numpy as jnp

        targets = np.pad(tokens[:, 1:], ((0, 0), (0, 1)))
        weights = np.ones(tokens.shape, np.float32)
        weights[:, -1] = 0
        arrays = (tokens.astype(np.int32), targets.astype(np.int32), weights)
        laid_out = (self.context.to_layout(jnp.asarray(x)) for x in arrays)
        return tuple(laid_out)  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class Losses:
    values: list[float]
    batch: int
    window: int
    seconds: float


def train(setup: Setup, text: np.ndarray, bar: Any) -> Losses:
    """Trains in place on random windows of the text; returns the loss of every step, in nats per byte."""
    import optax
    from flax import nnx

    from ring_jax.commands.demo_model import loss_fn

    optimizer = nnx.Optimizer(setup.model, optax.adamw(3e-3), wrt=nnx.Param)
    setup.replicate(setup.model)
    setup.replicate(optimizer)
    window = min(WINDOW, len(text))

    @nnx.jit(donate_argnums=(0, 1))
    def step(model, optimizer, batch):
        loss, grads = nnx.value_and_grad(loss_fn)(model, *batch, seq_len=window)
        optimizer.update(model, grads)
        return loss

    random = np.random.default_rng(0)
    begin, values = time.perf_counter(), []
    for _ in range(STEPS):
        starts = random.integers(0, len(text) - window + 1, BATCH)
        batch = setup.lay_out(np.stack([text[s : s + window] for s in starts]))
        values.append(float(step(setup.model, optimizer, batch)))
        bar.set_description(f"train, loss {values[-1]:.2f}")
        bar.update()
    return Losses(values, BATCH, window, time.perf_counter() - begin)


@dataclasses.dataclass(frozen=True)
class LongPass:
    tokens: int
    seconds: float
    loss: float
    difference: float
    largest: float
    collectives: dict[str, int]


def long_pass(setup: Setup, text: np.ndarray, bar: Any) -> LongPass:
    """One forward pass over `text` on all devices, and the same on one device to compare with."""
    import jax
    from flax import nnx

    from ring_jax.commands.demo_model import cross_entropy

    bar.set_description("long pass: compile")
    seq_len = len(text)
    inputs, targets, weights = setup.lay_out(text[None])
    graph, state = nnx.split(setup.model)

    @jax.jit
    def forward(state, inputs):
        return nnx.merge(graph, state)(inputs, seq_len=seq_len)

    compiled = forward.lower(state, inputs).compile()
    bar.update()
    bar.set_description("long pass")
    begin = time.perf_counter()
    logits = jax.block_until_ready(compiled(state, inputs))
    seconds = time.perf_counter() - begin
    loss = float(cross_entropy(logits, targets, weights))
    sharded = np.asarray(setup.context.from_layout(logits, seq_len))
    bar.update()

    bar.set_description("the same unsharded")
    setup.model.set_context(None)
    graph, state = nnx.split(setup.model)
    state = jax.tree.map(np.asarray, state)

    @jax.jit
    def forward_here(state, inputs):
        return nnx.merge(graph, state)(inputs)

    unsharded = np.asarray(forward_here(state, text[None].astype(np.int32)))
    bar.update(2)
    difference, largest = float(np.abs(sharded - unsharded).max()), float(np.abs(unsharded).max())
    return LongPass(seq_len, seconds, loss, difference, largest, count_collectives(compiled.as_text() or ""))


def work_balance(tokens: int, ranks: int) -> list[Balance]:
    import ring_jax

    layouts: dict[str, Layout] = {
        "contiguous": ring_jax.Contiguous(),
        "striped": ring_jax.Striped(),
        "zigzag": ring_jax.Zigzag(),
        "zigzag, block 128": ring_jax.Zigzag(block=128),
    }
    return [causal_balance(name, layout, tokens, ranks) for name, layout in layouts.items()]


def print_balances(balances: list[Balance]) -> None:
    print("balance   causal work of each rank over the mean, and time of the ring over the ideal")
    for balance in balances:
        shares = " ".join(f"{share:.2f}" for share in balance.share)
        print(f"          {balance.name:<18} {shares}   ring {balance.slowdown:.2f}x")


def _counted(collectives: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(collectives.items())) or "none"
