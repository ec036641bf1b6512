# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Reading a profile
#
# Where does the time of a pass go, and does data travel while devices compute? First what the planner says before
# there is a GPU, then what a profiler says of a program that ran.

# %%
import tempfile
from pathlib import Path

import jax

jax.config.update("jax_num_cpu_devices", 4)  # before jax touches a device

import matplotlib.pyplot as plt

import ring_jax
from ring_jax import plan, plot
from ring_jax.bench import trace

# %% [markdown]
# ## Before: a plan
#
# A prefill of 128K tokens of Qwen3.5-9B over eight H100s. Rates are measured ones; `ring-jax plan --check` compares
# them with your machine.

# %%
planned = plan.predict("qwen3.5-9b", tokens=1 << 17, mesh={"context": 8}, gpu="h100")
planned

# %%
plot.timeline(planned.prefill)

# %% [markdown]
# One group of four layers: three with the gated delta rule, whose states pass between ranks in the open (the short
# marks on the link's row), one with full attention, behind whose blocks the keys travel.

# %%
print(f"{planned.prefill.hidden_share:.0%} of the transfer is hidden")
for term, seconds in planned.prefill.terms.items():
    print(f"{seconds / planned.prefill.seconds:6.1%}  {term}")

# %% [markdown]
# ## After: a trace
#
# `jax.profiler.trace` writes what every device did. Here: a ring of four emulated devices.

# %%
mesh = jax.make_mesh((4,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
cp = ring_jax.ContextParallel("context", layout="zigzag", mesh=mesh, strategy="ring")
arrays = [cp.to_layout(jax.random.normal(jax.random.key(i), (1, 2048, 4, 64))) for i in range(3)]
attend = jax.jit(lambda q, k, v: ring_jax.ring_attention(q, k, v, is_causal=True, context=cp))
jax.block_until_ready(attend(*arrays))  # compiled before the trace begins

with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
        jax.block_until_ready(attend(*arrays))
    (file,) = Path(folder).rglob("*.xplane.pb")
    profile = jax.profiler.ProfileData.from_file(str(file))
    events = [
        (event.start_ns / 1e6, event.end_ns / 1e6, event.name)
        for plane in profile.planes
        for line in plane.lines
        for event in line.events
        if event.name.startswith(("collective-permute", "dot", "fusion", "loop", "while", "copy"))
    ]
print(len(events), "events of XLA")

# %%
names = {}
for begin, end, name in events:
    kind = name.split(".")[0].split(":")[0]
    names[kind] = names.get(kind, 0.0) + end - begin
largest = sorted(names.items(), key=lambda item: -item[1])[:8]
figure, axes = plt.subplots(figsize=(8, 3))
axes.barh([name for name, _ in largest], [ms for _, ms in largest])
axes.invert_yaxis()
axes.set(xlabel="ms, all devices together")
plt.show()

# %% [markdown]
# On emulated devices the loops over tiles take the time, and what a permute shows is mostly one device waiting for
# another. On GPUs each device has streams of its own, and
# `ring_jax.bench.trace` sorts their kernels into compute and transfer. It takes any list of events; here is one made
# by hand, as two layers of a ring look like:

# %%
made = []
for layer in range(2):
    begin = layer * 2.2
    made += [(begin, begin + 0.9, "ring_jax_flash_forward"), (begin + 0.9, begin + 2.0, "ring_jax_flash_forward")]
    made += [
        (begin + 0.1, begin + 0.7, "ncclDevKernel_SendRecv"),
        (begin + 2.0, begin + 2.2, "ncclDevKernel_AllGather"),
    ]
activity = trace.activity_of("GPU:0", made)
print(f"hidden: {activity.hidden_share:.0%}, idle: {activity.idle_share:.0%}")
for kind, found in activity.by_kind().items():
    print(f"{found['ms']:6.2f} ms, {found['alone_ms']:5.2f} alone, {found['calls']} kernels: {kind}")

# %% [markdown]
# The permute (0.6 ms a layer) runs behind the block on the rank's own keys: hidden. The gather at the end of each
# layer waits for the block and has nothing to hide behind: that is the part to look at first.
# `ring-jax bench ring --profile` and `ring-jax bench model --profile --png FILE` print and draw the same for real
# traces.

# %%
with tempfile.TemporaryDirectory() as folder:
    trace.draw([activity], f"{folder}/timeline.png", "two layers of a ring, made by hand")
    image = plt.imread(f"{folder}/timeline.png")
figure, axes = plt.subplots(figsize=(10, 2.6))
axes.imshow(image)
axes.axis("off")
plt.show()
