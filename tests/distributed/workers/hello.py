"""Joins the others and adds up their ranks over the network; prints what a test wants to see."""

import json
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

import ring_jax

ring_jax.distributed.initialize(timeout=120)
total = multihost_utils.process_allgather(np.int32(jax.process_index() + 1)).sum().item()
report = {"rank": jax.process_index(), "devices": jax.device_count(), "sum": total, "arguments": sys.argv[1:]}
report["context"] = ring_jax.distributed.mesh().shape["context"]
# In one write: where tasks share a pipe, the parts that an unbuffered print sends could mix.
sys.stdout.write(f"report {json.dumps(report)}\n")
