"""The documents: their code runs, their links resolve, their tables are those of the code."""

import doctest
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

import jax_fp8gemm
from benchmarks import readme_table
from jax_fp8gemm import operation
from jax_fp8gemm.jit import settings
from jax_fp8gemm.jit.config import GemmConfig
from jax_fp8gemm.jit.device import H200
from jax_fp8gemm.jit.problem import GemmProblem
from jax_fp8gemm.jit.tile import shared_bytes

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(path for name in ("benchmarks", "cuda", "docs", "jax_fp8gemm") for path in (ROOT / name).rglob("*.md")),
]


def python_blocks(path):
    return re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.M | re.S)


def prose(path):
    """The text without code: fenced blocks, indented blocks, `spans`."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    text = re.sub(r"^ {4}.*$", "", text, flags=re.M)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(path):
    """The names that a Markdown viewer gives to the headings."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture
def readme(monkeypatch, tmp_path):
    """The README's names, after all of its Python has run from top to bottom."""
    monkeypatch.setenv(settings.CACHE_DIR.name, str(tmp_path))
    monkeypatch.setattr(operation, "targets_hopper", lambda: True)  # whatever GPU is here: it exports
    names = {}
    for block in python_blocks(README):
        exec(compile(block, README, "exec"), names)
    return names


def test_the_readme_starts_with_ten_lines_of_code():
    first = python_blocks(README)[0]
    assert sum(bool(line.strip()) for line in first.splitlines()) == 10


def test_the_code_of_the_readme_runs(readme):
    exact = jnp.float32(readme["x"]) @ jnp.float32(readme["w"]).T
    error = jnp.linalg.norm(jnp.float32(readme["y"]) - exact) / jnp.linalg.norm(exact)
    # Rounding to e4m3 errs by at most 2^-4 of a normal number, evenly spread: by 2^-4 / sqrt(3) in the root
    # mean square. Two operands with random signs make sqrt(2) of it; no rounding at all would leave bf16's.
    assert 2.0**-7 < error < 2**0.5 * 2.0**-4 / 3**0.5
    assert readme["y"].shape == (64, 2112)
    assert readme["y"].dtype == jnp.bfloat16
    assert b"jax_fp8gemm_launch_v1" in readme["program"], "the exported program calls the kernel"


def test_the_moe_layer_of_the_readme_runs(readme):
    tokens, gate_up, down, routing_weights = (
        jax.random.normal(jax.random.key(seed), shape)
        for seed, shape in enumerate([(40, 256), (4, 256, 256), (4, 256, 128), (40, 2)]))
    ids = jax.random.randint(jax.random.key(4), (40, 2), 0, 6)  # two of the six experts are elsewhere
    out = readme["moe"](jnp.bfloat16(tokens), ids, routing_weights,
                        *(jax_fp8gemm.quantize(w, (128, 128)) for w in (gate_up, down)))
    gate, up = jnp.split(jnp.einsum("td,gfd->tgf", tokens, gate_up), 2, axis=-1)
    of_experts = jnp.einsum("tgf,gdf->tgd", jax.nn.silu(gate) * up, down)
    exact = jnp.einsum("tgd,tsg,ts->td", of_experts, jax.nn.one_hot(ids, 4), routing_weights)
    error = jnp.linalg.norm(jnp.float32(out) - exact) / jnp.linalg.norm(exact)
    # As above for each of three GEMMs, whose errors add up: silu(gate) is about gate, or about zero.
    assert 2.0**-7 < error < (2 + 2 + 2) ** 0.5 * 2.0**-4 / 3**0.5


@pytest.mark.parametrize("name", jax_fp8gemm.__all__)
def test_the_examples_of_docstrings_run(name):
    given = {"model": lambda params, tokens: tokens, "params": {}, "tokens": 1}  # an example's own
    names = {"jax": jax, "jnp": jnp, **vars(jax_fp8gemm), **given}
    runner = doctest.DocTestRunner()
    for example in doctest.DocTestFinder(recurse=False).find(getattr(jax_fp8gemm, name), name, globs=names):
        assert runner.run(example).failed == 0


def test_the_readme_has_the_table_of_environment_variables():
    assert README.read_text().count(f"\n\n{settings.markdown_table()}\n\n") == 1


def test_the_map_of_shared_memory_adds_up():
    size = shared_bytes(GemmProblem(4096, 4096, 7168), GemmConfig(128, 128, num_stages=5, num_consumers=2))
    text = (ROOT / "cuda/README.md").read_text()
    assert f"{size:,} bytes of at most {H200.shared_bytes:,}" in " ".join(text.split())
    table = text[text.index("| member"):].split("\n\n")[0]
    members = [int(row.split("|")[-2].replace(",", "")) for row in table.splitlines()[2:]]
    assert size - 1024 < sum(members) <= size, "the struct's own size is a multiple of 1024"


def test_the_benchmark_table_has_its_place():
    assert "the table" in readme_table.insert(README.read_text(), "the table")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(path):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(path))
    for link in links:
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(path):
    """`cuda/smem.cuh`, `jit/config.py`, `bench_dense.py`, ...: from the root, the package, or nearby."""
    text = path.read_text()
    for name in re.findall(r"`([\w./-]+\.(?:py|cuh|cc|h|md|json|toml|txt|npz))`", text):
        places = (ROOT, ROOT / "jax_fp8gemm", ROOT / "jax_fp8gemm/jit", path.parent)
        assert any((place / name).exists() for place in places), name
