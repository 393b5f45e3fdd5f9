"""The cache of kernels: hits, damage, folders that cannot be written, threads, 16 cold processes."""

import logging
import pathlib
import subprocess
import sys
import threading
import time

import pytest

from jax_fp8gemm.jit.cache import KernelCache, cache_key, kernel_cache

KEY = cache_key("a kernel")
CUBIN = b"\x7fELF" + bytes(range(256)) * 64


class Compiler:
    """Stands in for NVRTC; counts its calls."""

    def __init__(self, cubin=CUBIN, seconds=0.0):
        self.cubin, self.seconds, self.calls = cubin, seconds, 0

    def __call__(self):
        self.calls += 1
        time.sleep(self.seconds)
        return self.cubin


def unused():
    raise AssertionError("compiled what the cache should have")


def test_key_depends_on_every_part_and_on_where_it_ends():
    keys = [cache_key(*parts) for parts in (["ab", "c"], ["a", "bc"], ["abc"], ["ab", "c", ""], ["c", "ab"])]
    assert len(set(keys)) == len(keys)
    assert cache_key("ab", "c") == keys[0]


def test_memory_then_disk_then_compiler(tmp_path):
    first, compiler = KernelCache(tmp_path), Compiler()
    assert first.get(KEY, compiler) == CUBIN
    assert compiler.calls == 1
    assert first.get(KEY, unused) == CUBIN
    assert KernelCache(tmp_path).get(KEY, unused) == CUBIN
    other = Compiler(b"another")
    assert first.get(cache_key("another kernel"), other) == b"another"
    assert other.calls == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_a_hit_on_disk_takes_less_than_10_ms(tmp_path):
    KernelCache(tmp_path).get(KEY, Compiler())
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        KernelCache(tmp_path).get(KEY, unused)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.01


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: data[:20], lambda data: data[:32], lambda data: data[:-1],
    lambda data: data + b"\0", lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:],
    lambda data: bytes([data[0] ^ 128]) + data[1:],
], ids=["empty", "half a digest", "no cubin", "short", "long", "flipped bit", "flipped digest"])
def test_a_damaged_entry_is_compiled_again_and_mended(tmp_path, damage, caplog):
    KernelCache(tmp_path).get(KEY, Compiler())
    path = tmp_path / f"{KEY}.cubin"
    path.write_bytes(damage(path.read_bytes()))
    compiler = Compiler()
    assert KernelCache(tmp_path).get(KEY, compiler) == CUBIN
    assert compiler.calls == 1
    assert "is damaged" in caplog.text
    assert KernelCache(tmp_path).get(KEY, unused) == CUBIN


def _below_a_file(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    return tmp_path / "file" / "cubins"


@pytest.mark.parametrize("folder", [_below_a_file, lambda tmp_path: pathlib.Path("/proc/jax_fp8gemm/cubins")],
                         ids=["below a file", "in a read-only file system"])
def test_a_folder_that_cannot_be_made_leaves_the_memory_with_one_warning(tmp_path, folder, caplog):
    cache, compiler = KernelCache(folder(tmp_path)), Compiler()
    for name in ("one", "two", "one"):
        assert cache.get(cache_key(name), compiler) == CUBIN
    assert compiler.calls == 2
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "JAX_FP8GEMM_CACHE_DIR" in warnings[0].getMessage()


def test_a_read_only_folder_still_serves_what_it_has(tmp_path, monkeypatch):
    KernelCache(tmp_path).get(KEY, Compiler())

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    cache, compiler = KernelCache(tmp_path), Compiler(b"another")
    assert cache.get(KEY, unused) == CUBIN
    assert cache.get(cache_key("another kernel"), compiler) == b"another"


def test_a_full_disk_leaves_no_entry_and_no_debris(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jax_fp8gemm.jit.cache.os.replace", refuse)
    assert KernelCache(tmp_path).get(KEY, Compiler()) == CUBIN
    assert [path.name for path in tmp_path.iterdir()] == ["locks"]
    assert "No space left" in caplog.text


def test_a_holder_that_hangs_is_not_waited_for_forever(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("jax_fp8gemm.jit.cache.LOCK_TIMEOUT", 0.05)
    holder, release = KernelCache(tmp_path), threading.Event()

    def hang():
        release.wait(30)
        return CUBIN

    thread = threading.Thread(target=lambda: holder.get(KEY, hang))
    thread.start()
    while not list(tmp_path.glob("locks/*.lock")):
        time.sleep(0.001)
    try:
        time.sleep(0.05)
        assert KernelCache(tmp_path).get(KEY, Compiler()) == CUBIN
        assert "is held for more than" in caplog.text
    finally:
        release.set()
        thread.join()


def test_a_failed_compilation_is_not_remembered(tmp_path):
    cache = KernelCache(tmp_path)

    def fail():
        raise RuntimeError("does not compile")

    with pytest.raises(RuntimeError, match="does not compile"):
        cache.get(KEY, fail)
    assert cache.get(KEY, Compiler()) == CUBIN


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache, compiler = KernelCache(None), Compiler()
    assert cache.get(KEY, compiler) == cache.get(KEY, unused) == CUBIN
    assert cache.entries() == []
    assert not list(tmp_path.iterdir())


def test_threads_compile_once_and_different_kernels_at_the_same_time(tmp_path):
    cache, compiler = KernelCache(tmp_path), Compiler(seconds=0.05)
    both = threading.Barrier(2, timeout=20)  # broken unless two kernels are in work at once

    def wait_for_the_other():
        both.wait()
        return b"slow"

    results = []
    threads = [threading.Thread(target=lambda: results.append(cache.get(KEY, compiler))) for _ in range(8)]
    threads += [threading.Thread(target=lambda key=key: results.append(cache.get(key, wait_for_the_other)))
                for key in (cache_key("x"), cache_key("y"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == sorted([CUBIN] * 8 + [b"slow"] * 2)
    assert compiler.calls == 1


def test_clear_forgets_everything(tmp_path):
    cache = KernelCache(tmp_path / "cubins")
    cache.get(KEY, Compiler())
    assert len(cache.entries()) == 1
    assert cache.clear() == 1
    compiler = Compiler()
    assert cache.entries() == []
    assert cache.get(KEY, compiler) == CUBIN
    assert compiler.calls == 1


def test_clear_counts_what_went(tmp_path, monkeypatch):
    cache = KernelCache(tmp_path)
    for name in "abc":
        cache.get(cache_key(name), lambda: b"cubin")
    monkeypatch.setattr("jax_fp8gemm.jit.cache.shutil.rmtree",  # the others belong to somebody else
                        lambda folder, **_: next(folder.glob("*.cubin")).unlink())
    assert cache.clear() == 1


def test_the_process_has_one_cache_per_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_FP8GEMM_CACHE_DIR", str(tmp_path))
    assert kernel_cache() is kernel_cache()
    assert kernel_cache().folder == tmp_path / "cubins"
    monkeypatch.setenv("JAX_FP8GEMM_CACHE_DIR", "none")
    assert kernel_cache().folder is None


WORKER = """
import hashlib, os, pathlib, sys, time
from jax_fp8gemm.jit.cache import KernelCache, cache_key

folder, names = pathlib.Path(sys.argv[1]), sys.argv[2:]
cache = KernelCache(folder / "cubins")
(folder / "ready" / str(os.getpid())).touch()
while not (folder / "go").exists():
    time.sleep(0.001)

def compile(name):
    with open(folder / "compiled", "a") as log:  # one short write: appended as a whole
        log.write(name + "\\n")
    time.sleep(0.1)
    return name.encode() * 1000

for name in names:
    assert cache.get(cache_key(name), lambda: compile(name)) == name.encode() * 1000
"""


def test_16_processes_that_start_cold_compile_each_kernel_once(tmp_path):
    names = ["alpha", "beta", "gamma"]
    (tmp_path / "ready").mkdir()
    command = [sys.executable, "-c", WORKER, str(tmp_path), *names]
    workers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(16)]
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "ready").iterdir())) < 16 and time.monotonic() < deadline:
        time.sleep(0.01)
    (tmp_path / "go").touch()
    for worker in workers:
        _, errors = worker.communicate(timeout=60)
        assert worker.returncode == 0, errors
    assert sorted((tmp_path / "compiled").read_text().split()) == names
    assert len(list((tmp_path / "cubins").glob("*.cubin"))) == 3
