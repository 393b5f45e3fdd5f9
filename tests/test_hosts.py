"""Several processes under jax.distributed: what they compute, compile and lower, and how they differ."""

import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import pytest

from jax_fp8gemm import check_hosts, hosts

TESTS = pathlib.Path(__file__).parent
TIMEOUT_S = 120  # for a few seconds' work: only what hangs takes as long
NUM_DEVICES = 8


def run_processes(count, *program, cache, **variables):
    """The status, and what each process printed, with its errors."""
    command = [sys.executable, "-m", "jax_fp8gemm", "launch", "--processes", str(count), sys.executable]
    variables = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(NUM_DEVICES // count), "XLA_FLAGS": "",
                 "JAX_FP8GEMM_CACHE_DIR": str(cache), "PYTHONWARNINGS": "error", **variables}
    with subprocess.Popen([*command, *map(str, program)], env={**os.environ, **variables}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as launcher:
        try:
            output, _ = launcher.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{count} processes hang:\n{end(launcher)}")
    lines = [re.match(r"\[(\d)\] (.*)", line) for line in output.splitlines()]
    printed = ["\n".join(line[2] for line in lines if line and line[1] == str(idx)) for idx in range(count)]
    return launcher.returncode, printed, output


def end(launcher):
    """What it printed. JAX goes on after the first SIGTERM; the second kills."""
    for _ in range(2):
        launcher.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return launcher.communicate(timeout=5)[0]
    raise AssertionError("the launcher itself hangs")


def compilations(printed):
    return re.findall(r"INFO: compiling (.*)", "\n".join(printed))


def run_program(folder, count, *options):
    """What the processes of `hosts_program.py` wrote, and the kernels that they compiled."""
    status, printed, output = run_processes(count, TESTS / "hosts_program.py", folder, *options,
                                            cache=folder / "cache", JAX_FP8GEMM_LOG="info")
    assert status == 0, output
    return [json.loads((folder / f"{idx}.json").read_text()) for idx in range(count)], compilations(printed)


def cubins(folder):
    return {path.name: path.read_bytes() for path in folder.glob("cubins/*.cubin")}


@pytest.mark.parametrize("count", [2, 4])
def test_processes_compute_as_one_device_does_and_compile_each_kernel_once(tmp_path, count):
    """The program itself compares the values, to the bit. All of it is the same in all processes."""
    written, compiled = run_program(tmp_path, count)
    assert set(written[0]) == {"auto", "explicit", "shard_map"}
    for of_process in written:
        assert of_process == written[0]
    assert len(compiled) == len(set(compiled)) == len(cubins(tmp_path / "cache")) >= 5


def test_hosts_with_caches_of_their_own_make_the_same_programs(tmp_path):
    (one, other), compiled = run_program(tmp_path, 2, "--own-cache")
    assert one == other
    kernels, same_kernels = (cubins(tmp_path / "cache" / name) for name in "01")
    assert kernels == same_kernels
    assert len(compiled) == 2 * len(set(compiled)) == 2 * len(kernels) >= 10
    for mode, program in one.items():
        assert (program["kernels"] > 0) == (mode != "auto"), "with Auto axes, they come when XLA partitions"


# ---- what differs

DIFFERING = """
import importlib.metadata
import os
import sys
import jax
from jax_fp8gemm import check_hosts

jax.distributed.initialize()
process = os.environ["OMPI_COMM_WORLD_RANK"]
{changes}
check_hosts({{"batch": 256}}, timeout_s=20)
print("all the same")
"""


def run_differing(changes, count, **options):
    return run_processes(count, "-c", DIFFERING.format(changes=changes), **options)


def test_processes_that_are_alike_go_on(tmp_path):
    """XLA's dumps may go to a folder of each host."""
    status, printed, output = run_differing(
        'os.environ["XLA_FLAGS"] = "--xla_dump_to=/tmp/" + process', 2, cache=tmp_path)
    assert status == 0, output
    assert all("all the same" in text for text in printed)


def test_every_process_says_what_differs_before_a_device_is_asked_for(tmp_path):
    changes = """
if process == "3":
    jax.__version__ = "0.0.1"
if process in "13":
    os.environ["JAX_FP8GEMM_NUM_SMS"] = "lots"
    jax.config.update("jax_enable_x64", True)
jax.local_devices = None  # not callable
"""
    status, printed, output = run_differing(changes, 4, cache=tmp_path)
    assert status == 1, output
    for text in printed:
        assert "all the same" not in text
        assert re.search(r"RuntimeError: check_hosts: expected processes that make the same programs, got "
                         r"differences in\n    jax: '.*' in processes 0-2 \(.*\); '0\.0\.1' in process 3 \(",
                         text)
        assert "    jax_enable_x64: 'False' in processes 0, 2 (" in text
        assert "'True' in processes 1, 3 (" in text
        assert "JAX_FP8GEMM_NUM_SMS: 'all' in processes 0, 2 (" in text
        assert "expected a positive integer, got 'lots'\" in processes 1, 3 (" in text
        assert text.count("' in process") == 5, "what is equal is not named"


def test_every_process_says_that_devices_and_measurements_differ(tmp_path):
    changes = """
if process == "1":
    jax.config.update("jax_num_cpu_devices", 3)
    os.environ["JAX_FP8GEMM_CACHE_DIR"] += "/measured"
"""
    (tmp_path / "measured" / "tuned").mkdir(parents=True)
    (tmp_path / "measured" / "tuned" / "nvidia-h200.json").write_text("{}")
    status, printed, output = run_differing(changes, 2, cache=tmp_path)
    assert status == 1, output
    for text in printed:
        assert re.search(r"devices of a process: '4 x cpu' in process 0 \(.*\); '3 x cpu' in process 1", text)
        assert "own measured configurations (JAX_FP8GEMM_CACHE_DIR): 'none' in process 0 (" in text


def test_a_process_that_does_not_come_is_named(tmp_path):
    changes = """
if process == "1":
    sys.exit()  # waits for the others, but never calls it
check_hosts(timeout_s=1)
"""
    status, printed, output = run_differing(changes, 2, cache=tmp_path)
    assert status == 1, output
    assert "expected a call in each of 2 processes within 1 s, got none in process 1" in printed[0]


def test_xla_flags_are_compared_one_by_one_but_for_dumps(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", " --b=2 --a --xla_dump_to=/x=y  --b=3=4")
    assert hosts._xla_flags() == {"XLA_FLAGS --b": "3=4", "XLA_FLAGS --a": ""}
    monkeypatch.delenv("XLA_FLAGS")
    assert hosts._xla_flags() == {}


def test_packages_that_make_programs_are_compared(monkeypatch):
    installed = [("jax_cuda13_plugin", "0.12.0"), (None, "1"), ("nvidia-nccl-cu13", "2.28"), ("numpy", "2.4"),
                 ("nvidia_nccl_cu13", "2.27")]
    monkeypatch.setattr(hosts.importlib.metadata, "distributions", lambda: [
        types.SimpleNamespace(name=name, version=version) for name, version in installed])
    assert hosts._packages() == {"jax-cuda13-plugin": "0.12.0", "nvidia-nccl-cu13": "2.28"}


def test_a_persistent_cache_is_compared_by_whether_there_is_one(tmp_path):
    name = "JAX's persistent compilation cache"
    assert hosts._facts_of_software()[name] == "off"
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        assert hosts._facts_of_software()[name] == "on"
    finally:
        jax.config.update("jax_compilation_cache_dir", None)


def test_without_other_processes_there_is_nothing_to_compare(monkeypatch):
    monkeypatch.setattr(hosts, "_exchange", None)
    check_hosts({"batch": 256})


@pytest.mark.parametrize(("values", "line"), [
    ("xxxx", None),
    ("xyxzxxx", "b: 'x' in processes 0, 2, 4-6 (node0, node1, node2, node3); 'y' in process 1 (node0); "
                "'z' in process 3 (node1)"),
    (["x", None], "b: 'x' in process 0 (node0); nothing in process 1 (node0)"),
    ("x" * 10 + "y", "b: 'x' in processes 0-9 (5 hosts); 'y' in process 10 (node5)"),
])
def test_a_difference_is_one_line(values, line):
    facts = [{"a": "same", "b": value} if value else {"a": "same"} for value in values]
    entries = {idx: {"host": f"node{idx // 2}", "facts": facts[idx]} for idx in reversed(range(len(facts)))}
    assert hosts.differences(entries) == ([line] if line else [])
