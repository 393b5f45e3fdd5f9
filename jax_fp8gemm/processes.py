"""Starts the processes of a `jax.distributed` program on this machine, and ends them together."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO

LOOPBACK = "127.0.0.1"
GRACE_S = 5.0  # for a process to end by itself, once another has failed
FORWARDED = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
_POLL_S = 0.05


def launch(command: Sequence[str], num_processes: int) -> int:
    """Runs `command` as `num_processes` processes, in each of which `jax.distributed.initialize()` works.

    Every line that they print gets the process's index in front. Interrupts and SIGTERM go to all of them,
    and kill them when they come again. When one fails, the others are ended: they would wait for it.

    Returns:
      The exit status: that of the process that failed first, 128 and the number of the signal where one
      ended it, or 0.

    Raises:
      ValueError: `num_processes` is less than 1.
      OSError: the command cannot be started.
    """
    if num_processes < 1:
        raise ValueError(f"--processes: expected at least 1, got {num_processes}")
    port = _free_port()
    processes, printers = [], []
    with _signals_go_to(processes):
        try:
            for idx in range(num_processes):
                process = _start(command, _environment(idx, num_processes, port))
                processes.append(process)
                printers += _printers(idx, process)
            status = _wait(processes)
        finally:
            _end(processes)
    for printer in printers:
        printer.join(GRACE_S)  # a pipe stays open as long as anything that a process has left behind
    return status


def _start(command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen:
    """In a session of its own: signals then reach what the process has started, too, and nothing twice."""
    return subprocess.Popen(command, env=environment, text=True, errors="replace", stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=True)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        return listener.getsockname()[1]


def _environment(idx: int, num_processes: int, port: int) -> dict[str, str]:
    """NOTES: JAX takes the coordinator's address from variables of its own, but the number of processes, and
    which one this is, only from those of a cluster's launcher. These are mpirun's, of Open MPI 4. As under
    mpirun, a process gets one GPU, that of its index.
    """
    address = f"{LOOPBACK}:{port}"
    return {
        **os.environ,
        "JAX_COORDINATOR_ADDRESS": address, "JAX_COORDINATOR_BIND_ADDRESS": address,
        "OMPI_VERSION": "4", "OMPI_MCA_orte_hnp_uri": f"0.0;tcp://{address}",
        "OMPI_COMM_WORLD_SIZE": str(num_processes), "OMPI_COMM_WORLD_RANK": str(idx),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(idx),
        "PYTHONUNBUFFERED": "1",  # output goes into a pipe, and is to be seen as it comes
        **_without_proxy(),
    }


def _without_proxy() -> dict[str, str]:
    """gRPC, over which the processes find each other, would ask a proxy for this machine, and wait for it."""
    if not any(name.lower().endswith("_proxy") for name in os.environ):
        return {}  # JAX warns of every variable of that name
    return {"no_proxy": f"{LOOPBACK},{os.environ.get('no_proxy', '')}"}


def _printers(idx: int, process: subprocess.Popen) -> list[threading.Thread]:
    threads = [threading.Thread(target=_print_lines, args=(idx, source, sink), daemon=True)
               for source, sink in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))]
    for thread in threads:
        thread.start()
    return threads


def _print_lines(idx: int, source: IO[str], sink: IO[str]) -> None:
    with source:
        for line in source:
            sink.write(f"[{idx}] {line.rstrip()}\n")
            sink.flush()


@contextlib.contextmanager
def _signals_go_to(processes: list[subprocess.Popen]) -> Iterator[None]:
    """A second signal of a kind ends processes that did not heed the first."""
    seen = set()

    def forward(number, frame):
        _send(processes, signal.SIGKILL if number in seen else number)
        seen.add(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _send(processes: list[subprocess.Popen], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)


def _wait(processes: list[subprocess.Popen]) -> int:
    """Until one fails, or all have ended; the exit status."""
    while True:
        codes = [process.poll() for process in processes]
        failed = next((idx for idx, code in enumerate(codes) if code), None)
        if failed is not None:
            break
        if None not in codes:
            return 0
        time.sleep(_POLL_S)
    code = codes[failed]
    reason = f"status {code}" if code > 0 else _signal_name(-code)
    print(f"jax_fp8gemm: process {failed} ended with {reason}", file=sys.stderr)
    return code if code > 0 else 128 - code


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _end(processes: list[subprocess.Popen]) -> None:
    """Ends those that still run.

    NOTES: jax.distributed takes SIGTERM for the notice of a preemption, and goes on.
    """
    _send(processes, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
    _send(processes, signal.SIGKILL)
    for process in processes:
        process.wait()
