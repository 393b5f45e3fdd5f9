"""The launcher of several processes: their environment, output, failures and signals."""

import signal
import subprocess
import sys
import textwrap
import time

import pytest

from jax_fp8gemm import __main__ as cli
from jax_fp8gemm import processes as launcher
from jax_fp8gemm.processes import launch

HEAD = """
import os, signal, sys, time
rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
"""


def program(text):
    """A command; without JAX, which would take a second."""
    return [sys.executable, "-S", "-c", HEAD + textwrap.dedent(text)]


def test_processes_know_each_other_and_their_lines_have_their_index(capsys, monkeypatch):
    monkeypatch.setenv("no_proxy", "example.org")
    status = launch(program("""
        for name in ("OMPI_COMM_WORLD_SIZE", "JAX_COORDINATOR_ADDRESS", "no_proxy"):
            print(name, os.environ[name])
        print("a progress bar\\rgoes on", "without an end", end="")
        print("an error", file=sys.stderr)
    """), 3)
    assert status == 0
    out, err = (sorted(text.splitlines()) for text in capsys.readouterr())
    address = next(line for line in out if "COORDINATOR" in line).split()[2]
    assert address.startswith("127.0.0.1:")
    assert out == sorted(f"[{idx}] {line}" for idx in range(3) for line in (
        "OMPI_COMM_WORLD_SIZE 3", f"JAX_COORDINATOR_ADDRESS {address}", "no_proxy 127.0.0.1,example.org",
        "a progress bar", "goes on without an end"))
    assert err == [f"[{idx}] an error" for idx in range(3)]


def test_output_comes_while_the_processes_run(tmp_path):
    command = [sys.executable, "-m", "jax_fp8gemm", "launch", "--processes", "1",
               *program("print('now')\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.01)"),
               str(tmp_path / "seen")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "[0] now\n"
        (tmp_path / "seen").touch()
        assert process.wait(60) == 0


@pytest.mark.parametrize(("end", "status", "reason"), [
    ("sys.exit(7)", 7, "status 7"), ("os.kill(os.getpid(), signal.SIGSEGV)", 128 + 11, "SIGSEGV"),
    ("os.kill(os.getpid(), 40)", 128 + 40, "signal 40")])
def test_one_that_fails_ends_all(capsys, monkeypatch, tmp_path, end, status, reason):
    """Also one that goes on after SIGTERM, as those of jax.distributed do."""
    monkeypatch.setattr(launcher, "GRACE_S", 0.5)
    start = time.monotonic()
    assert launch([*program(f"""
        signal.signal(signal.SIGTERM, lambda *_: print("heard", flush=True))
        print("ready", flush=True)
        open(f"{{sys.argv[1]}}/{{rank}}", "w").close()
        while rank == 1 and len(os.listdir(sys.argv[1])) < 3:
            time.sleep(0.01)
        if rank == 1:
            {end}
        for _ in range(600):
            time.sleep(0.1)
    """), str(tmp_path)], 3) == status
    assert time.monotonic() - start < 30
    out, err = capsys.readouterr()
    assert err == f"jax_fp8gemm: process 1 ended with {reason}\n"
    assert sorted(out.splitlines()) == ["[0] heard", "[0] ready", "[1] ready", "[2] heard", "[2] ready"]


def test_what_a_process_has_started_ends_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "GRACE_S", 0.5)
    started = tmp_path / "started"
    assert launch([*program("""
        if rank == 0:
            child = os.fork()
            if child:
                with open(sys.argv[1] + ".new", "w") as file:
                    file.write(str(child))
                os.rename(sys.argv[1] + ".new", sys.argv[1])
            time.sleep(60)
        while not os.path.exists(sys.argv[1]):
            time.sleep(0.01)
        sys.exit(3)
    """), str(started)], 2) == 3
    deadline = time.monotonic() + 10
    while is_running(int(started.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("sent", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGTERM, signal.SIGTERM]])
def test_signals_go_to_all_and_the_second_kills(sent):
    """The launcher itself goes on: a process may save its state, and end well."""
    text = """
        def stop(number, frame):
            print("stops", number, flush=True)
            if TWICE:
                time.sleep(60)
            sys.exit()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        print("ready", flush=True)
        time.sleep(60)
    """.replace("TWICE", str(len(sent) == 2))
    command = [sys.executable, "-m", "jax_fp8gemm", "launch", "--processes", "2", *program(text)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        lines = [process.stdout.readline() for _ in range(2)]
        for number in sent:
            process.send_signal(number)
            lines += [process.stdout.readline() for _ in range(2) if len(lines) < 4]
        _, errors = process.communicate(timeout=30)
    assert sorted(lines) == sorted(f"[{idx}] {word}\n" for idx in range(2)
                                   for word in ("ready", f"stops {sent[0]:d}"))
    assert process.returncode == (128 + 9 if len(sent) == 2 else 0)
    assert errors == ("jax_fp8gemm: process 0 ended with SIGKILL\n" if len(sent) == 2 else "")


@pytest.mark.parametrize(("arguments", "message"), [
    (["--processes", "0", "true"], "--processes: expected at least 1, got 0"),
    (["--processes", "2"], "launch: expected a command, such as python train.py, got none"),
    (["--processes", "2", "/no/such/program"], "[Errno 2] No such file or directory: '/no/such/program'"),
])
def test_a_wrong_command_line_is_said_in_one_line(capsys, arguments, message):
    assert cli.main(["launch", *arguments]) == 2
    assert capsys.readouterr().err == f"jax_fp8gemm: {message}\n"


@pytest.mark.parametrize("separator", [[], ["--"]])
def test_the_options_of_the_program_are_its_own(capsys, separator):
    command = program("print(sys.argv[1:]); sys.exit(4)")
    arguments = ["--processes", "1", *separator, *command, "--processes", "5", "--", "-n"]
    assert cli.main(["launch", *arguments]) == 4
    assert capsys.readouterr().out == "[0] ['--processes', '5', '--', '-n']\n"
