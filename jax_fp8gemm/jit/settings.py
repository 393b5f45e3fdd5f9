"""What can be set from outside: the environment variables, in one table, and the limit on SMs."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import logging
import os
import pathlib
from collections.abc import Iterator

import platformdirs
from jax.experimental.xla_metadata import set_xla_metadata

PREFIX = "JAX_FP8GEMM_"
LOG_LEVELS = ("debug", "info", "warning", "error")
NO_CACHE = "none"


@dataclasses.dataclass(frozen=True)
class Variable:
    """An environment variable; `default` is what its absence means, in words, for the table."""

    name: str
    default: str
    meaning: str

    def get(self) -> str | None:
        """Its value, or None where it is unset or empty."""
        return os.environ.get(self.name, "").strip() or None

    def error(self, expected: str) -> ValueError:
        return ValueError(f"{self.name}: expected {expected}, got {os.environ[self.name]!r}")

    def path(self) -> pathlib.Path | None:
        """Its value as a path, the user's home in the place of a leading "~"."""
        value = self.get()
        try:
            return pathlib.Path(value).expanduser() if value else None
        except RuntimeError:  # pathlib's, for a home that is not known
            raise self.error("a path, without a ~ where no home is known") from None

    def flag(self) -> bool:
        value = (self.get() or "0").lower()
        if value not in ("0", "1", "false", "true"):
            raise self.error("0 or 1")
        return value in ("1", "true")


CACHE_DIR = Variable(
    PREFIX + "CACHE_DIR", "the user's cache folder",
    f"Folder of compiled kernels (cubins/) and of your own measured configurations (tuned/); `{NO_CACHE}` "
    "keeps kernels in memory only.")
LOG = Variable(
    PREFIX + "LOG", "Python's logging decides",
    f"Prints log messages of the logger `jax_fp8gemm` from this level on: {', '.join(LOG_LEVELS)}.")
PRINT_CONFIG = Variable(
    PREFIX + "PRINT_CONFIG", "0", "1 prints the configuration of each kernel when its call is lowered.")
DUMP_DIR = Variable(
    PREFIX + "DUMP_DIR", "no dumps", "Folder that gets the source, PTX, cubin and SASS of each kernel.")
LINE_INFO = Variable(
    PREFIX + "LINE_INFO", "0", "1 compiles kernels with line numbers, for profilers.")
NVCC = Variable(
    PREFIX + "NVCC", "NVRTC", "Path of an nvcc to compile kernels with instead of NVRTC.")
NUM_SMS = Variable(
    PREFIX + "NUM_SMS", "all",
    "Number of SMs that a GEMM may use; `limit_sms` does the same for a block of code.")

VARIABLES = (CACHE_DIR, LOG, PRINT_CONFIG, DUMP_DIR, LINE_INFO, NVCC, NUM_SMS)


def markdown_table() -> str:
    """The table of environment variables, as the README shows it."""
    rows = [f"| `{v.name}` | {v.default} | {v.meaning} |" for v in VARIABLES]
    return "\n".join(["| variable | default | meaning |", "|---|---|---|", *rows])


def cache_dir() -> pathlib.Path | None:
    """Folder of compiled kernels and measured configurations; None: keep nothing on disk."""
    if CACHE_DIR.get() == NO_CACHE:
        return None
    given = CACHE_DIR.path()
    if given is not None:
        return given
    folder = platformdirs.user_cache_path("jax_fp8gemm", appauthor=False)
    return folder if folder.is_absolute() else None  # a user without a home gets a "~" that nothing expands


def dump_dir() -> pathlib.Path | None:
    return DUMP_DIR.path()


def print_config() -> bool:
    return PRINT_CONFIG.flag()


def line_info() -> bool:
    return LINE_INFO.flag()


def nvcc() -> pathlib.Path | None:
    """The nvcc to compile with; None: NVRTC."""
    value = NVCC.get()
    if value is None:
        return None
    if not pathlib.Path(value).is_file():
        raise NVCC.error("the path of an nvcc")
    return pathlib.Path(value)


_sm_limit: contextvars.ContextVar[int | None] = contextvars.ContextVar("jax_fp8gemm_sm_limit", default=None)


def num_sms() -> int | None:
    """The number of SMs that a GEMM may use; None: all."""
    limit = _sm_limit.get()
    if limit is not None:
        return limit
    value = NUM_SMS.get()
    if value is None:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise NUM_SMS.error("a positive integer")
    return int(value)


@contextlib.contextmanager
def limit_sms(limit: int) -> Iterator[None]:
    """GEMMs whose calls are traced in this context use at most `limit` SMs, and leave the rest to others.

    The other kernels are short and bound by memory; they are not limited.

    Under `jax.jit` the limit holds for what is called inside the context, functions traced outside it
    included: JAX traces them again.

    Example:
      >>> with limit_sms(100):
      ...   out = model(params, tokens)

    Raises:
      ValueError: `limit` is not a positive int.
    """
    if type(limit) is not int or limit < 1:
        raise ValueError(f"limit_sms: expected a positive int, got {limit!r}")
    token = _sm_limit.set(limit)
    try:
        with in_jit_key("num_sms", str(limit)):
            yield
    finally:
        _sm_limit.reset(token)


def in_jit_key(name: str, value: str) -> contextlib.AbstractContextManager:
    """Makes `value` part of the key under which JAX caches traces, so that none is reused under another
    value.

    Metadata of XLA is the one public piece of JAX's state that is both free to choose and part of that key.
    """
    return set_xla_metadata(**{f"jax_fp8gemm_{name}": value})


def configure_logging() -> None:
    """Lets the package's log messages through to stderr where the environment asks for them."""
    level = LOG.get()
    if level is None:
        return
    if level.lower() not in LOG_LEVELS:
        raise LOG.error(f"one of {', '.join(LOG_LEVELS)}")
    logger = logging.getLogger("jax_fp8gemm")
    logger.setLevel(level.upper())
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(levelname)s: %(message)s"))
        logger.addHandler(handler)
