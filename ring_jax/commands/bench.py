"""``ring-jax bench``: speed of kernels, rings and whole models on this host's GPUs, after a check against a reference."""

import argparse
import importlib

from ring_jax.cli import CommandError, find_devices, need

BENCHES = {
    "attention": ("ring_jax.bench.attention", "the flash-attention kernels beside cuDNN, on one GPU"),
    "engine": ("ring_jax.bench.engine", "chunked prefill, prefix hits and decode of many rows through the engine"),
    "experts": ("ring_jax.bench.experts", "the experts of a layer beside XLA's loop and grouped products, on one GPU"),
    "gdn": ("ring_jax.bench.gdn", "the gated delta rule, its convolution and decode step, on one GPU or over ranks"),
    "model": ("ring_jax.bench.model", "prefill, decode and training of a whole model, and what the GPU could do"),
    "paged": ("ring_jax.bench.paged", "decode attention to paged keys, against the bytes of the keys, on one GPU"),
    "ring": ("ring_jax.bench.ring", "context-parallel attention in a jitted stack of layers, over all GPUs"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subparsers = parser.add_subparsers(dest="bench", metavar="BENCH", required=True)
    for name, (module, summary) in BENCHES.items():
        subparser = subparsers.add_parser(name, help=summary, description=importlib.import_module(module).__doc__)
        importlib.import_module(module).add_arguments(subparser)


def run(args: argparse.Namespace) -> int:
    if getattr(args, "png", None):
        need("matplotlib")
    _check(args)
    find_devices()
    bench = importlib.import_module(BENCHES[args.bench][0])
    reason = bench.unavailable(args)
    if reason:
        raise CommandError(reason)
    return bench.run(args)


def _check(args: argparse.Namespace) -> None:
    """Refuses sizes and masks that no case can have."""
    from ring_jax.bench.flash_forward import Case

    for name, value in vars(args).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (int, float)) and not isinstance(number, bool) and not number > 0:
                raise CommandError(f"--{name.replace('_', '-')} must be positive, got {number}")
    if hasattr(args, "heads") and args.heads % args.kv_heads:
        raise CommandError(f"--kv-heads must divide --heads, got {args.kv_heads} and {args.heads}")
    for shape in getattr(args, "shapes", ()):
        numbers = shape.split("x")
        if len(numbers) != 3 or not all(number.isdigit() and int(number) > 0 for number in numbers):
            raise CommandError(f"--shapes must be like 1x32768x32, batch x length x value heads, got {shape}")
        if int(numbers[2]) % args.key_heads:
            raise CommandError(f"--key-heads must divide the value heads, got {args.key_heads} and {numbers[2]}")
    for mask in getattr(args, "masks", ()):
        try:
            Case(1, min(args.lengths), 1, 1, 64, mask).bounds()
        except (ValueError, ZeroDivisionError) as error:
            raise CommandError(f"--masks {mask}: {error}") from error
