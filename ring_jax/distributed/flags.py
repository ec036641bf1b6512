"""Flags of XLA and NCCL that ring_jax recommends, as data: what for, and where that was measured. None is set unasked."""

import dataclasses
import os
from collections.abc import Iterable, MutableMapping

from ring_jax._checks import check_count, check_instance, describe


@dataclasses.dataclass(frozen=True)
class Flag:
    """One setting.

    Fields:
        name: of an environment variable, or of a flag of XLA ("--xla_...").
        value: as text.
        when: "one process" (of several GPUs), "several processes", or "always".
        reason: what it does for a ring, and what was measured.
    """

    name: str
    value: str
    when: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}={self.value}"


FLAGS = (
    Flag(
        "--xla_gpu_collective_permute_mode",
        "peer",
        "one process",
        "the ring's hops go by copy engines instead of NCCL kernels: 64 MiB in 196 us against 436 (H200, NVLink, jax 0.11.2), "
        "no gain below 4 MiB a hop, and no multiprocessor is taken from the attention kernels; works inside one process only",
    ),
    Flag(
        "NCCL_NVLS_ENABLE",
        "0",
        "always",
        "NCCL sets up no NVLink multicast: a ring sends from one GPU to one other and gains nothing from it, and it costs "
        "GPU memory at start-up",
    ),
)


def recommended_flags(processes: int = 1) -> tuple[Flag, ...]:
    """The flags that suit a job of so many processes. Nothing is set: see `use_flags`.

    Example:
        >>> [flag.name for flag in recommended_flags(processes=2)]
        ['NCCL_NVLS_ENABLE']
    """
    processes = check_count("processes", processes, 1)
    wanted = {"always", "one process" if processes == 1 else "several processes"}
    return tuple(flag for flag in FLAGS if flag.when in wanted)


def use_flags(flags: Iterable[Flag], environment: MutableMapping[str, str] | None = None) -> list[Flag]:
    """Sets flags where nothing is set yet; call it before jax touches a device. XLA ends the process at a flag that it
    does not know: these are known from jax 0.10.2 on.

    Args:
        flags: such as `recommended_flags()`.
        environment: to change; default: that of this process.

    Returns:
        Those that were set; the others had a value, which stays.

    Example:
        >>> [str(flag) for flag in use_flags(recommended_flags(), {"NCCL_NVLS_ENABLE": "1"})]
        ['--xla_gpu_collective_permute_mode=peer']
    """
    if isinstance(flags, (str, bytes)) or not isinstance(flags, Iterable):
        raise TypeError(f"flags must be a sequence of ring_jax.distributed.Flag, got {describe(flags)}")
    check_instance("environment", environment, MutableMapping, "a mapping that can be changed", optional=True)
    target = os.environ if environment is None else environment
    done = []
    for flag in flags:
        check_instance("flags", flag, Flag, "a sequence of ring_jax.distributed.Flag")
        given = target.get("XLA_FLAGS", "")
        if flag.name.startswith("--"):
            if any(word.split("=")[0] == flag.name for word in given.split()):
                continue
            target["XLA_FLAGS"] = f"{given} {flag}".strip()
        elif flag.name in target:
            continue
        else:
            target[flag.name] = flag.value
        done.append(flag)
    return done
