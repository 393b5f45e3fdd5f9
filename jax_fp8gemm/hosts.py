"""Several hosts: whether the processes of `jax.distributed` would all make the same programs."""

from __future__ import annotations

import collections
import importlib.metadata
import itertools
import json
import os
import platform
import socket
from collections.abc import Mapping

import jax
import jaxlib

# Private: JAX has no public handle on the store of its coordination service. Its public way to exchange
# values, multihost_utils, runs a program on all devices, which may hang where the processes differ.
from jax._src.distributed import global_state

from jax_fp8gemm import diagnose
from jax_fp8gemm.jit.fingerprint import facts_of_device, facts_of_library

# Beside jax and jaxlib: XLA for GPUs is in the plugin, it compiles with ptxas of nvcc's package and takes
# cuDNN's and cuBLAS's algorithms, and NCCL refuses to talk to another version of itself.
PACKAGES = ("jax-cuda", "jax-fp8gemm", "nvidia-cublas", "nvidia-cuda-nvcc", "nvidia-cudnn", "nvidia-nccl")
CONFIG = (
    "jax_platforms",  # what a program is for; JAX would wait minutes for processes that start another backend
    "jax_enable_x64", "jax_numpy_dtype_promotion",  # the dtypes of a program
    "jax_default_matmul_precision",  # of its products
    "jax_default_prng_impl", "jax_threefry_partitionable",  # its random numbers
    "jax_use_shardy_partitioner",  # how it is partitioned
    "jax_optimization_level",  # how XLA compiles it
    "jax_share_binary_between_hosts",  # who does: a process that expects another's program waits for it
)
# They write files, maybe to another folder on each host, and change no program.
HARMLESS_XLA_FLAGS = "--xla_dump_"
MAX_HOSTS_NAMED = 4
_exchanges = itertools.count()


def check_hosts(facts: Mapping[str, object] | None = None, *, timeout_s: float = 300.0) -> None:
    """Raises in every process of `jax.distributed` if they would not all make the same programs.

    Every process calls it, after `jax.distributed.initialize()` and before anything is computed or lowered.
    What is compared goes through JAX's coordination service, so that versions which cannot compute together
    are told apart all the same. First that is software and settings: Python, JAX and its CUDA packages, the
    NVIDIA driver, this library with its tables and headers, the compiler of the kernels, those environment
    variables, XLA flags and options of `jax.config` that change programs. Then, with JAX's backend started,
    the number and kind of each process's devices and your own measured configurations.

    Without `jax.distributed`, or with a single process, it does nothing.

    Args:
      facts: what else has to be equal, by name, such as the arguments of a program; compared as text.
      timeout_s: seconds to wait for the slowest process, at each of the two comparisons.

    Raises:
      RuntimeError: the processes differ; the message, the same in all of them, has each difference, the
        values, and the processes that have them. Or not all of them came within `timeout_s`.

    Example:
      >>> check_hosts({"batch size": 256})
    """
    if global_state.client is None or global_state.num_processes == 1:
        return
    given = {name: str(value) for name, value in (facts or {}).items()}
    _compare({**given, **_facts_of_software(), **facts_of_library()}, timeout_s)
    _compare(_facts_of_devices(), timeout_s)


def _facts_of_software() -> dict[str, str]:
    config = {name: str(getattr(jax.config, name)) for name in CONFIG}
    # A process that finds a program in the persistent cache takes no part in compiling it.
    is_cached = jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir is not None
    return {
        "Python": platform.python_version(), "jax": jax.__version__, "jaxlib": jaxlib.__version__,
        **_packages(), "NVIDIA driver": diagnose.driver().state, **config,
        "JAX's persistent compilation cache": "on" if is_cached else "off", **_xla_flags()}


def _packages() -> dict[str, str]:
    versions = {}
    for distribution in importlib.metadata.distributions():
        name = (distribution.name or "").lower().replace("_", "-")  # a damaged installation has none
        if name.startswith(PACKAGES):
            versions.setdefault(name, distribution.version)  # of two, Python imports the first
    return versions


def _xla_flags() -> dict[str, str]:
    """Each flag by itself, so that neither their order counts nor those that change no program."""
    flags = (flag.partition("=") for flag in os.environ.get("XLA_FLAGS", "").split())
    return {f"XLA_FLAGS {name}": value for name, _, value in flags if not name.startswith(HARMLESS_XLA_FLAGS)}


def _facts_of_devices() -> dict[str, str]:
    """NOTES: JAX waits minutes for the devices of a process that has none, and again if it is asked again."""
    name = "devices of a process"
    try:
        kinds = collections.Counter(device.device_kind for device in jax.local_devices())
    except RuntimeError as error:  # all have to hear of it
        return {name: f"none: {error}"}
    return {name: ", ".join(f"{kinds[kind]} x {kind}" for kind in sorted(kinds)), **facts_of_device()}


def _compare(facts: dict[str, str], timeout_s: float) -> None:
    lines = differences(_exchange({"host": socket.gethostname(), "facts": facts}, timeout_s))
    if lines:
        raise RuntimeError("\n    ".join([
            "check_hosts: expected processes that make the same programs, got differences in", *lines]) +
            "\nGive all processes the same packages, environment and arguments, and devices of one kind.")


def _exchange(own: dict, timeout_s: float) -> dict[int, dict]:
    """What each process has to say, by its index.

    Raises:
      RuntimeError: not all of them came in time.
    """
    client, folder = global_state.client, f"jax_fp8gemm/check_hosts/{next(_exchanges)}"
    client.key_value_set(f"{folder}/{global_state.process_id}", json.dumps(own))
    late = None
    try:
        client.wait_at_barrier(folder, int(timeout_s * 1000))
    except RuntimeError as error:
        late = error
    entries = {int(key.rpartition("/")[2]): json.loads(value)
               for key, value in client.key_value_dir_get(folder)}
    if late is not None:
        missing = sorted(set(range(global_state.num_processes)) - set(entries))
        raise RuntimeError(
            f"check_hosts: expected a call in each of {global_state.num_processes} processes within "
            f"{timeout_s:g} s, got none in {_processes(missing)}" if missing else
            f"check_hosts: the others waited {timeout_s:g} s for this process, and gave up") from late
    return entries


def differences(entries: Mapping[int, dict]) -> list[str]:
    """A line for each fact that processes differ in: its values, the most frequent first, and who has them.

    Args:
      entries: by the index of the process, its "host" and its "facts", texts by name.

    Example:
      >>> differences({0: {"host": "a", "facts": {"jax": "0.11.2"}}, 1: {"host": "b", "facts": {}}})
      ["jax: '0.11.2' in process 0 (a); nothing in process 1 (b)"]
    """
    lines = []
    for name in dict.fromkeys(name for entry in entries.values() for name in entry["facts"]):
        having = collections.defaultdict(list)
        for process, entry in sorted(entries.items()):
            having[entry["facts"].get(name)].append(process)
        if len(having) > 1:
            lines.append(f"{name}: " + "; ".join(
                f"{'nothing' if value is None else repr(value)} in {_processes(processes)} "
                f"({_hosts(entries[process]['host'] for process in processes)})"
                for value, processes in sorted(having.items(), key=lambda item: -len(item[1]))))
    return lines


def _processes(indices: list[int]) -> str:
    """Sorted indices as a person writes them: "processes 0-2, 5"."""
    groups = itertools.groupby(enumerate(indices), lambda place: place[1] - place[0])
    runs = [[index for _, index in group] for _, group in groups]
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return f"process{'es' if len(indices) > 1 else ''} {text}"


def _hosts(names) -> str:
    different = list(dict.fromkeys(names))
    return ", ".join(different) if len(different) <= MAX_HOSTS_NAMED else f"{len(different)} hosts"
