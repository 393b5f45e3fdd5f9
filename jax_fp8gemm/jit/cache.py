"""Compiled kernels, in memory and on disk, safe between threads and between processes.

On disk an entry is a file named by its key, `<key>.cubin`: the SHA-256 of the cubin, then the cubin. It
appears under its name only when it is complete (written aside, then renamed), so readers need no lock. The
lock of a key only keeps processes that start together from compiling the same kernel: whoever gets it first
compiles, the others read.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import logging
import os
import pathlib
import shutil
import tempfile
import threading
from collections.abc import Callable

import filelock

from jax_fp8gemm.jit import settings

logger = logging.getLogger(__name__)

LOCK_TIMEOUT = 60.0  # seconds: no kernel compiles for so long; its holder hangs
_DIGEST = hashlib.sha256().digest_size


def cache_key(*parts: str) -> str:
    """The key of what is made from `parts`: equal exactly where all of them are."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


class KernelCache:
    """Cubins by key. `folder` None, or one that cannot be written, leaves the memory of this process.

    Example:
      >>> cache = KernelCache(pathlib.Path("~/kernels").expanduser())
      >>> cubin = cache.get(cache_key(source, options), lambda: compile_source(source))
    """

    def __init__(self, folder: pathlib.Path | None):
        self.folder = folder
        self._memory: dict[str, bytes] = {}
        self._key_locks = collections.defaultdict(threading.Lock)
        self._guard = threading.Lock()  # of the two above
        self._warned = False

    def get(self, key: str, compile: Callable[[], bytes]) -> bytes:
        """The cubin of `key`: from memory, from disk, or by `compile()`, run by one thread of one process."""
        with self._guard:
            if key in self._memory:
                return self._memory[key]
            key_lock = self._key_locks[key]
        with key_lock:
            if key not in self._memory:
                cubin = self._read(key) or self._compile_once(key, compile)
                with self._guard:
                    self._memory[key] = cubin
            return self._memory[key]

    def _compile_once(self, key: str, compile: Callable[[], bytes]) -> bytes:
        lock = self._lock(key)
        if lock is None:
            return compile()
        try:
            cubin = self._read(key)  # another process may have compiled it while this one waited
            if cubin is None:
                cubin = compile()
                self._write(key, cubin)
            return cubin
        finally:
            lock.release()

    def _lock(self, key: str) -> filelock.BaseFileLock | None:
        """The lock of `key`, held; None where there is no folder to share, or its holder hangs."""
        if self.folder is None:
            return None
        try:
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.folder / "locks" / f"{key}.lock", timeout=LOCK_TIMEOUT)
            lock.acquire()
            return lock
        except filelock.Timeout:
            logger.warning("the lock of kernel %s is held for more than %g s", key, LOCK_TIMEOUT)
        except (OSError, NotImplementedError) as error:
            self._warn(error)
        return None

    def _path(self, key: str) -> pathlib.Path:
        return self.folder / f"{key}.cubin"

    def _read(self, key: str) -> bytes | None:
        """The cubin on disk; None where there is none, or a damaged one."""
        if self.folder is None:
            return None
        try:
            data = self._path(key).read_bytes()
        except OSError:
            return None
        digest, cubin = data[:_DIGEST], data[_DIGEST:]
        if not cubin or hashlib.sha256(cubin).digest() != digest:
            logger.warning("%s is damaged: compiling the kernel again", self._path(key))
            return None
        return cubin

    def _write(self, key: str, cubin: bytes) -> None:
        temporary = None
        try:
            handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=key, suffix=".tmp")
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(cubin).digest() + cubin)
            os.chmod(temporary, 0o644)  # mkstemp's 0600 would shut out the others who share the folder
            os.replace(temporary, self._path(key))
        except OSError as error:
            if temporary is not None:
                pathlib.Path(temporary).unlink(missing_ok=True)
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("no kernels can be kept in %s (%s): each process compiles its own. Set %s to a "
                           "folder that can be written.", self.folder, error, settings.CACHE_DIR.name)

    def entries(self) -> list[pathlib.Path]:
        """The files of all kernels on disk."""
        return sorted(self.folder.glob("*.cubin")) if self.folder else []

    def clear(self) -> int:
        """Forgets all kernels, in memory and on disk; returns how many files went."""
        entries = self.entries()
        with self._guard:
            self._memory.clear()
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)
        return len(entries) - len(self.entries())


@functools.cache
def _open(folder: pathlib.Path | None) -> KernelCache:
    return KernelCache(folder)


def kernel_cache() -> KernelCache:
    """The cache of this process, in the folder that the settings name."""
    folder = settings.cache_dir()
    return _open(folder and folder / "cubins")
