"""The training example with a recipe that compiles in seconds; process 2 kills itself in step KILLED_AT."""

import importlib.util
import os
import signal
import sys
from pathlib import Path

import jax

from ring_jax.models.qwen3_5 import Config
from tests.support.models import SMALLEST

SCRIPT = Path(__file__).parents[3] / "examples" / "train_qwen3_5.py"


def load():
    spec = importlib.util.spec_from_file_location("train_qwen3_5", SCRIPT)
    script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look
    spec.loader.exec_module(script)
    return script


def shrink(script):
    """`script` with one small stage, no checks at the end, a logged loss for every step, and a text that is soon read."""
    model = Config(**script.BYTES, **SMALLEST)
    script.TINY = script.Recipe(model, (script.Stage(1.0, 128, 4),), 6, 1e-2, ())
    script.LOG_EVERY = 1
    script.training_text = script.held_out_text
    return script


def die_in(script, step):
    texts, made = script.texts, []

    def dies(*args):
        made.append(args)
        if len(made) == step and jax.process_index() == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return texts(*args)

    script.texts = dies


if __name__ == "__main__":
    example = shrink(load())
    if "KILLED_AT" in os.environ:
        die_in(example, int(os.environ["KILLED_AT"]))
    example.run()
