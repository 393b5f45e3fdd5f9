"""Environment variables, and the limit on SMs under jax.jit."""

import logging
import pathlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_fp8gemm.jit import settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for variable in settings.VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)


def test_defaults(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert settings.cache_dir() == tmp_path / "jax_fp8gemm"
    assert settings.dump_dir() is settings.nvcc() is settings.num_sms() is None
    assert settings.print_config() is settings.line_info() is False


def test_values(monkeypatch, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.touch()
    for name, value in {"CACHE_DIR": "~/kernels", "DUMP_DIR": str(tmp_path), "PRINT_CONFIG": "1",
                        "LINE_INFO": "true", "NVCC": str(nvcc), "NUM_SMS": "100"}.items():
        monkeypatch.setenv(settings.PREFIX + name, value)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert settings.cache_dir() == pathlib.Path("/home/somebody/kernels")
    assert settings.dump_dir() == tmp_path
    assert settings.nvcc() == nvcc
    assert settings.num_sms() == 100
    assert settings.print_config() is settings.line_info() is True


@pytest.mark.parametrize(("name", "value", "read"), [
    ("PRINT_CONFIG", "yes", settings.print_config), ("LINE_INFO", "2", settings.line_info),
    ("NUM_SMS", "0", settings.num_sms), ("NUM_SMS", "-3", settings.num_sms),
    ("NUM_SMS", "many", settings.num_sms),
    ("CACHE_DIR", "~nobody-at-all/x", settings.cache_dir), ("DUMP_DIR", "~nobody-at-all", settings.dump_dir),
    ("NVCC", "/no/such/nvcc", settings.nvcc), ("LOG", "loud", settings.configure_logging),
])
def test_a_bad_value_is_named(monkeypatch, name, value, read):
    monkeypatch.setenv(settings.PREFIX + name, value)
    with pytest.raises(ValueError, match=f"{settings.PREFIX}{name}: expected .*, got '{value}'"):
        read()


def test_without_a_home_there_is_no_cache_folder(monkeypatch):
    monkeypatch.setattr("jax_fp8gemm.jit.settings.platformdirs.user_cache_path",
                        lambda *_, **__: pathlib.Path("~/.cache/jax_fp8gemm"))
    assert settings.cache_dir() is None
    monkeypatch.setenv("JAX_FP8GEMM_CACHE_DIR", "none")
    assert settings.cache_dir() is None


def test_the_log_level_prints_messages(monkeypatch, capsys):
    logger = logging.getLogger("jax_fp8gemm")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    monkeypatch.setenv("JAX_FP8GEMM_LOG", "info")
    settings.configure_logging()
    settings.configure_logging()
    logging.getLogger("jax_fp8gemm.jit.cache").info("compiled")
    logging.getLogger("jax_fp8gemm.jit.cache").debug("unseen")
    assert capsys.readouterr().err.splitlines() == ["jax_fp8gemm.jit.cache: INFO: compiled"]


def test_the_table_has_every_variable_that_is_read():
    table = settings.markdown_table().splitlines()
    assert [row.split("`")[1] for row in table[2:]] == [variable.name for variable in settings.VARIABLES]
    source = pathlib.Path(settings.__file__).read_text()
    assert source.count("os.environ") == 2, "environment variables are read in Variable alone"
    for path in pathlib.Path(settings.__file__).parent.rglob("*.py"):
        assert path.name == "settings.py" or "environ" not in path.read_text(), path


def test_limit_sms_nests_and_goes_before_the_environment(monkeypatch):
    monkeypatch.setenv("JAX_FP8GEMM_NUM_SMS", "100")
    with settings.limit_sms(64):
        with settings.limit_sms(32):
            assert settings.num_sms() == 32
        assert settings.num_sms() == 64
    assert settings.num_sms() == 100


@pytest.mark.parametrize("limit", [0, -1, 2.0, "8", None, True])
def test_limit_sms_wants_a_positive_int(limit):
    message = "limit_sms: expected a positive int, got"
    with pytest.raises(ValueError, match=message), settings.limit_sms(limit):
        pass


def test_limit_sms_never_reuses_a_trace_under_another_limit():
    seen = []

    @jax.jit
    def inner(x):
        seen.append(settings.num_sms())
        return 3 * x

    @jax.jit
    def outer(x):
        return inner(x) + 1

    x = jnp.arange(1.0, 4.0)
    for limit in (None, 64, None, 64, 32, 64, None):
        if limit is None:
            out = outer(x)
        else:
            with settings.limit_sms(limit):
                out = outer(x)
        np.testing.assert_array_equal(out, 3 * np.arange(1.0, 4.0) + 1)
    assert seen == [None, 64, 32]


def test_limit_sms_holds_in_the_thread_that_entered_it():
    seen = []
    with settings.limit_sms(8):
        thread = threading.Thread(target=lambda: seen.append(settings.num_sms()))
        thread.start()
        thread.join()
    assert seen == [None]
