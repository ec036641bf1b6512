"""What commands that write text share: how tokens are drawn, and the line around the text."""

import argparse
from typing import Any

from ring_jax.cli import CommandError

RULE = "-" * 80


def sampling_of(args: argparse.Namespace) -> Any:
    """`Sampling` of --temperature, --top-k and --top-p."""
    from ring_jax.inference import Sampling

    try:
        return Sampling(args.temperature, args.top_k, args.top_p)
    except ValueError as error:
        raise CommandError(str(error)) from error
