"""Decode and prefill compiled for a GPU, and what of the compiled programs writes arrays of the size of a weight.

As a script (`python -m tests.models.qwen3_5.compiled FOLDER`) it compiles for a described H100 on a machine without one:
FOLDER holds jax's CUDA plugin (docs/kernels/flash.md, "Reports of ptxas", says how to get it). It must be found before
jax starts, hence the process.
"""

import dataclasses
import json
import math
import os
import re
import sys

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
runtime_version { major: 13 minor: 0 patch: 0 }
dnn_version_info { major: 9 minor: 19 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
VIEWS = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "fusion-done", "copy-done"}
PROMPT, ROOM, NEW = 1024, 64, 256  # tokens: cached, decoded at most, prefilled
LONG = 4160  # tokens prefilled, more than a weight has rows
CUBLAS = {
    "xla_gpu_enable_triton_gemm": False
}  # what a described GPU, which times nothing, needs for a card's usual choice
LEAST = 16 << 20  # bytes: half of the smallest projection below, more than any activation


def model_and_programs():
    """Two groups of layers of Qwen3.5-9B with a small vocabulary: (model, {name: (function, operands)})."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from ring_jax.models.qwen3_5 import Config, Qwen3_5

    config = dataclasses.replace(Config.preset("qwen3.5-9b"), num_layers=8, layer_types=(), vocab_size=4096)
    model = Qwen3_5(config, rngs=None)
    graph, state = nnx.split(model)
    build = lambda params: nnx.merge(graph, params)  # noqa: E731
    prefill = lambda params, tokens: build(params)(tokens, logits="last", cache_room=ROOM)  # noqa: E731
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    tokens = lambda n: jax.ShapeDtypeStruct((1, n), jnp.int32)  # noqa: E731
    cache = jax.eval_shape(prefill, params, tokens(PROMPT)).cache
    decode = jax.jit(lambda params, cache, token: build(params).decode(token, cache), donate_argnums=1)
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    prefill = jax.jit(prefill)
    return model, {
        "decode": (decode, (params, cache, one)),
        "prefill": (prefill, (params, tokens(NEW))),
        "long prefill": (prefill, (params, tokens(LONG))),
    }


def engine_decode(model):
    """The engine's decode of all steps, of one row: (program, operands, how many of the first are static)."""
    import jax
    import jax.numpy as jnp

    from ring_jax._mesh import HashablePartial
    from ring_jax.inference import programs
    from ring_jax.inference.control import COLUMNS
    from ring_jax.inference.pool import Geometry

    structure, params = model.split()
    rows, geometry = 1, Geometry(pages=16, page=64, rows=1, slots=2)
    local = programs._Local(structure, geometry.placement(None), 8)
    control, table = (jax.ShapeDtypeStruct((rows, n), jnp.int32) for n in (COLUMNS, 16))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    function = HashablePartial(programs._Local.decode, (local, True))
    return programs._run, (function, *(None,) * 4, geometry.shapes(structure), params, (control, table)), 5


def asks_the_host(text: str) -> list[str]:
    """Loops of a compiled program whose length depends on data, and its branches."""
    found = [line.strip() for line in text.splitlines() if re.search(r" = .* (while|conditional)\(", line)]
    return [line[:200] for line in found if " while(" not in line or "known_trip_count" not in line]


def large_results(text: str, least: int = LEAST) -> list[str]:
    """Instructions of a compiled program that write `least` bytes or more, but for updates in place: name, what the
    operation is (of a fusion, its last one), shape."""
    fused = set(re.findall(r"(?:calls|to_apply)=%([\w.\-]+)", text))
    bodies: dict[str, list[tuple[str, str, str, str]]] = {}
    body: list[tuple[str, str, str, str]] = []
    for line in text.splitlines():
        if found := re.match(r"(?:ENTRY )?%([\w.\-]+) \(", line):
            bodies[found.group(1)] = body = []
        elif found := re.match(r"\s+(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(.*", line):
            called = re.search(r"calls=%([\w.\-]+)", line)
            body.append((found.group(2), called.group(1) if called else "", found.group(4), found.group(3)))
    result = []
    for name in bodies.keys() - fused:
        for own, called, operation, shape in bodies[name]:
            operation = bodies[called][-1][2] if called else operation  # the root comes last
            if operation not in VIEWS | {"dynamic-update-slice"} and _size(shape) >= least:
                result.append(f"{own} {operation} {shape}")
    return result


def wide_attention(text: str) -> list[str]:
    """Instructions of compiled prefill that write arrays of the size of attention's out in float32."""
    heads, size = 16, 256
    return [x for x in large_results(text, NEW * heads * size * 4) if f"f32[1,{NEW},{heads},{size}]" in x]


def needless(text: str, rows: int = 4096) -> list[str]:
    """Of those, the ones that are matrices of so many rows, weights that products read or parts of them; and parts of products."""
    weight = rf"\[(1,)*{rows},\d+(,\d+)*\]"
    return [x for x in large_results(text) if re.search(weight, x) or x.split()[1] == "slice"]


def unwanted(name: str, text: str) -> list[str]:
    """What the program of this name must not write: activations of a long prefill are as large as weights."""
    return needless(text) if name == "long prefill" else large_results(text)


def _size(shape: str) -> int:
    """Bytes of the largest array in a shape or tuple of shapes; workspaces of libraries (s8) do not count."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    sizes = (BYTES.get(kind, 0) * math.prod(map(int, filter(None, dims.split(",")))) for kind, dims in arrays)
    return max((size for size, (kind, _) in zip(sizes, arrays, strict=True) if kind != "s8"), default=0)


def main(folder: str) -> None:
    sys.path.insert(0, folder)
    os.environ |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "JAX_PLATFORMS": "cpu"}
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

    topology = topologies.get_topology_desc("H100", "cuda", target_config=H100, topology="1x1x1")
    here = NamedSharding(Mesh(np.array(topology.devices), ("gpu",)), PartitionSpec())
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
    reports = {}
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("gpu",), (AxisType.Auto,), abstract_device=device)):
        model, programs = model_and_programs()
        programs = {name: (program, operands, 0) for name, (program, operands) in programs.items()}
        for name, (program, operands, static) in (programs | {"engine": engine_decode(model)}).items():
            given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), operands[static:])
            lowered = program.trace(*operands[:static], *given).lower(lowering_platforms=("cuda",))
            text = lowered.compile(compiler_options=CUBLAS if name == "long prefill" else {}).as_text()
            reports[name] = unwanted(name, text)
            if name == "engine":
                reports["asks the host"] = asks_the_host(text)
            if name == "prefill":
                reports["attention in float32"] = wide_attention(text)
                without = lowered.compile(compiler_options=CUBLAS).as_text()
                reports["prefill, products by cuBLAS"] = large_results(without)
    print(json.dumps(reports))


if __name__ == "__main__":
    main(sys.argv[1])
