"""The grouped kernels on a Hopper GPU: a group is a dense GEMM, whatever the routing.

Group by group, results are within derived bounds and have the emulation's bits. All that no group owns is NaN
in the operands: rows past a group's end, the weights of groups without rows. In the results it is zero, or
left alone.
"""

import dataclasses
import pathlib
import sys
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import emulator
from bounds import assert_groups_within_bound
from emulator import group_slices
from gpu_common import DTYPES, bits, draw, sample
from jax_fp8gemm import (
    ScaledArray,
    fp8_gemm,
    fp8_gemm_masked,
    fp8_gemm_ragged_k,
    fp8_gemm_ragged_m,
)
from jax_fp8gemm.jit import compiler
from jax_fp8gemm.jit.choose import ranked
from jax_fp8gemm.jit.device import current_device
from jax_fp8gemm.jit.problem import (
    MASKED,
    RAGGED_K,
    RAGGED_M,
    SCALE_BLOCK,
    TMA_ALIGNMENT,
    GemmProblem,
    ceil_div,
    round_up,
)
from jax_fp8gemm.jit.warmup import compile_all
from jax_fp8gemm.scaling import ROW_BLOCKS, SQUARE_BLOCKS

sys.path.append(str(pathlib.Path(__file__).parents[2]))  # last: benchmarks/ of the checkout

FUNCTIONS = {RAGGED_M: fp8_gemm_ragged_m, MASKED: fp8_gemm_masked, RAGGED_K: fp8_gemm_ragged_k}
INT_MAX, INT_MIN = 2**31 - 1, -(2**31)
SENTINEL = -77.0


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static sizes of a grouped GEMM, as in `GemmProblem`."""

    kind: str
    groups: int
    m: int
    n: int
    k: int
    rhs_scale_rows: int = SCALE_BLOCK

    def __str__(self):
        return f"{self.kind}-{self.groups}-{self.m}x{self.n}x{self.k}-{self.rhs_scale_rows}"

    @property
    def limit(self):
        """What groups share: rows, or blocks of K."""
        return ceil_div(self.k, SCALE_BLOCK) if self.kind == RAGGED_K else self.m

    @property
    def lhs(self):
        return *((self.groups,) if self.kind == MASKED else ()), self.m, self.k

    @property
    def rhs(self):
        return *((self.groups,) if self.kind != RAGGED_K else ()), self.n, self.k

    @property
    def out(self):
        return *((self.groups,) if self.kind != RAGGED_M else ()), self.m, self.n

    @property
    def rhs_granularity(self):
        return SQUARE_BLOCKS if self.kind != RAGGED_K and self.rhs_scale_rows == SCALE_BLOCK else ROW_BLOCKS

    def problem(self, out_dtype):
        k = round_up(self.k, TMA_ALIGNMENT)
        return GemmProblem(self.m, self.n, k, kind=self.kind, groups=self.groups, out_dtype=out_dtype,
                           rhs_scale_rows=self.rhs_granularity[0])

    def draw(self, kind="magnitudes", seed=0):
        return (draw(2 * seed, self.lhs, ROW_BLOCKS, kind),
                draw(2 * seed + 1, self.rhs, self.rhs_granularity, kind))


SHAPES = [
    (Shape(RAGGED_M, 5, 1000, 576, 1040), "bf16"), (Shape(RAGGED_M, 8, 2000, 2112, 576), "f32"),
    (Shape(RAGGED_M, 3, 513, 77, 80), "f32"), (Shape(RAGGED_M, 1, 300, 72, 1000), "bf16"),
    (Shape(RAGGED_M, 256, 4096, 576, 576), "bf16"), (Shape(RAGGED_M, 100, 700, 520, 272), "f32"),
    (Shape(RAGGED_M, 32, 1000, 2112, 7168), "bf16"), (Shape(RAGGED_M, 4, 700, 576, 1040, 1), "f32"),
    (Shape(MASKED, 5, 100, 576, 1040), "bf16"), (Shape(MASKED, 8, 65, 2112, 576), "f32"),
    (Shape(MASKED, 3, 37, 77, 80), "f32"), (Shape(MASKED, 70, 129, 72, 272), "bf16"),
    (Shape(MASKED, 256, 16, 576, 576), "bf16"), (Shape(MASKED, 32, 200, 576, 7168), "bf16"),
    (Shape(MASKED, 1, 1000, 520, 1021), "f32"), (Shape(MASKED, 4, 300, 576, 1040, 1), "f32"),
    (Shape(RAGGED_K, 4, 200, 576, 1280), "f32"), (Shape(RAGGED_K, 3, 130, 77, 2560), "bf16"),
    (Shape(RAGGED_K, 5, 72, 2112, 1040), "f32"), (Shape(RAGGED_K, 256, 72, 136, 33000), "bf16"),
    (Shape(RAGGED_K, 1, 300, 520, 80), "f32"),
]


def label(value):
    """The name of a parameter, not too long."""
    return str(value)[:40]


def routings(shape, rng):
    """Group sizes by name; those of the ragged kinds add up to at most what there is, but for the last."""
    groups, size = shape.groups, shape.k if shape.kind == RAGGED_K else shape.m
    share = size if shape.kind == MASKED else size // groups
    some = rng.integers(0, share + 1, groups)
    skewed = np.full(groups, share // 8)
    skewed[rng.integers(groups)] = size if shape.kind == MASKED else size - skewed[1:].sum()
    edges = np.resize([1, 127, 128, 129, 0], groups)
    if shape.kind != MASKED:
        edges = np.diff(np.minimum(np.cumsum(edges), size), prepend=0)
    return {
        "uniform": np.full(groups, share), "random": some, "skewed": skewed,
        "many zeros": np.where(rng.random(groups) < 0.8, 0, some), "all zero": np.zeros(groups, int),
        "one each": np.ones(groups, int) * min(share, 1), "edges": np.minimum(edges, size),
        "the last has all": np.where(np.arange(groups) < groups - 1, 0, size),
        "nonsense": np.resize([INT_MIN, 3, size + 7, -5, INT_MAX, INT_MAX, 10], groups),
    }


def fill(mask, array, value):
    """`array`, values and scales, with `value` where the mask is false."""
    return jax.tree.map(lambda leaf: jnp.where(mask, leaf, jnp.asarray(value, leaf.dtype)), array)


def poison(shape, lhs, rhs, sizes):
    """NaN wherever a kernel must not look; zeros where ragged K fills up the last block of a group."""
    slices = group_slices(shape.kind, sizes, shape.limit)
    if shape.kind == RAGGED_K:
        is_token = np.zeros(shape.limit * SCALE_BLOCK, bool)
        for s, size in zip(slices, sizes, strict=True):
            tokens = min(max(int(size), 0), (s.stop - s.start) * SCALE_BLOCK)
            is_token[s.start * SCALE_BLOCK :][:tokens] = True
        in_group = np.arange(shape.limit) < slices[-1].stop
        columns = np.repeat(in_group, SCALE_BLOCK)[: shape.k]
        return [ScaledArray(fill(columns, fill(is_token[: shape.k], x.values, 0), np.nan),
                            fill(in_group, x.scales, np.nan), x.granularity) for x in (lhs, rhs)]
    rows = np.arange(shape.m)
    ends = np.array([s.stop for s in slices])
    is_valid = rows < ends[:, None] if shape.kind == MASKED else rows < ends[-1]
    has_rows = np.array([s.stop > s.start for s in slices])
    return fill(is_valid[..., None], lhs, np.nan), fill(has_rows[:, None, None], rhs, np.nan)


def jit_into_nan(shape, out_dtype, **options):
    """The public function, jitted, with its result in the place of a donated array of NaN."""
    def gemm(poison, lhs, rhs, sizes):
        return FUNCTIONS[shape.kind](lhs, rhs, sizes, out_dtype=DTYPES[out_dtype], implementation="hopper",
                                     **options)

    nans = jax.jit(lambda: jnp.full(shape.out, jnp.nan, DTYPES[out_dtype]))
    jitted = jax.jit(gemm, donate_argnums=0, keep_unused=True)
    return lambda lhs, rhs, sizes: jitted(nans(), lhs, rhs, jnp.asarray(sizes, jnp.int32))


def group_of(shape, g, s, *arrays):
    """Group g, which lies at s, of lhs, rhs, out and more of the shape of out: the arrays of a dense GEMM."""
    lhs, rhs, *outs = arrays
    at = lambda array, *index: jax.tree.map(lambda leaf: leaf[index], array)
    if shape.kind == RAGGED_M:
        return at(lhs, s), at(rhs, g), *(at(out, s) for out in outs)
    if shape.kind == MASKED:
        return at(lhs, g, s), at(rhs, g), *(at(out, g, s) for out in outs)
    columns = slice(s.start * SCALE_BLOCK, s.stop * SCALE_BLOCK)
    of_group = lambda x: ScaledArray(x.values[:, columns], x.scales[:, s], x.granularity)
    return of_group(lhs), of_group(rhs), *(out[g] for out in outs)


def some_groups(slices, rng, count=4):
    """(index, slice) of the largest group, the last one with rows, and others with rows."""
    sizes = np.array([s.stop - s.start for s in slices])
    found = np.flatnonzero(sizes)
    if not len(found):
        return []
    drawn = rng.choice(found, min(count - 2, len(found)), replace=False)
    return [(g, slices[g]) for g in {int(sizes.argmax()), int(found[-1]), *map(int, drawn)}]


def assert_equals_emulation(shape, out, lhs, rhs, sizes, rng):
    """Bit for bit, on a sample of groups, rows and columns."""
    arrays = jax.tree.map(np.asarray, (lhs, rhs, out))
    for g, s in some_groups(group_slices(shape.kind, sizes, shape.limit), rng):
        x, w, y = group_of(shape, g, s, *arrays)
        rows, columns = sample(len(y), 12, rng), sample(shape.n, 64, rng)
        expected = emulator.gemm(
            x.values[rows], x.scales[rows], w.values[columns], w.scales[columns // w.granularity[0]],
            out_dtype=ml_dtypes.bfloat16 if out.dtype == jnp.bfloat16 else np.float32)
        np.testing.assert_array_equal(bits(y[rows][:, columns]), bits(expected), f"group {g} at {s}")


def owned(shape, sizes):
    """Which rows of out [*, M] belong to a group, all of them for ragged K."""
    slices = group_slices(shape.kind, sizes, shape.limit)
    if shape.kind == RAGGED_K:
        return np.ones(shape.out[:-1], bool)
    ends = np.array([s.stop for s in slices])
    return np.arange(shape.m) < (ends[:, None] if shape.kind == MASKED else ends[-1])


def check(shape, out, lhs, rhs, sizes, rng, random_signs=True):
    """`out` against the bounds and the emulation, and what no group owns."""
    slices = group_slices(shape.kind, sizes, shape.limit)
    # Few values are no sample whose mean square says much.
    rows = min((s.stop - s.start for s in slices if s.stop > s.start), default=0)
    random_signs = random_signs and (shape.kind == RAGGED_K or rows >= 8)
    assert_groups_within_bound(out, lhs, rhs, sizes, kind=shape.kind, random_signs=random_signs)
    assert_equals_emulation(shape, out, lhs, rhs, sizes, rng)
    if shape.kind == RAGGED_M:
        assert not bits(out)[~owned(shape, sizes)].any()
    if shape.kind == RAGGED_K:
        assert not bits(out)[[s.stop == s.start for s in slices]].any()


@pytest.mark.parametrize(("shape", "out_dtype"), SHAPES, ids=label)
def test_routings(rng, shape, out_dtype):
    gemm = jit_into_nan(shape, out_dtype)
    drawn = {kind: shape.draw(kind) for kind in ("magnitudes", "positive")}
    for name, sizes in routings(shape, rng).items():
        kind = "positive" if name == "random" else "magnitudes"
        lhs, rhs = poison(shape, *drawn[kind], sizes)
        out = gemm(lhs, rhs, sizes)
        try:
            check(shape, out, lhs, rhs, sizes, rng, random_signs=kind != "positive")
            is_owned = owned(shape, sizes)
            np.testing.assert_array_equal(bits(gemm(lhs, rhs, sizes))[is_owned], bits(out)[is_owned])
        except AssertionError as error:
            error.add_note(f"{name}: {sizes.tolist()}")
            raise


# What made DeepGEMM hang (#415) and crash (#237).
@pytest.mark.parametrize(("shape", "sizes"), [
    (Shape(RAGGED_K, 2, 192, 3072, 384), [128, 256]),
    (Shape(RAGGED_K, 128, 256, 768, 128 * 128), [128] * 128),
    (Shape(RAGGED_K, 128, 256, 768, 128 * 128), [0, 1, 128, 255] * 32),
], ids=label)
def test_known_failures_of_others(rng, shape, sizes):
    lhs, rhs = poison(shape, *shape.draw(), sizes)
    check(shape, jit_into_nan(shape, "f32")(lhs, rhs, sizes), lhs, rhs, sizes, rng)


@pytest.mark.parametrize("hint", [1, 20, 500])
def test_the_expected_group_size_changes_no_bit(rng, hint):
    shape, sizes = Shape(MASKED, 6, 260, 576, 1040), [0, 260, 1, 20, 129, 64]
    lhs, rhs = poison(shape, *shape.draw(), sizes)
    out = jit_into_nan(shape, "bf16", expected_group_size=hint)(lhs, rhs, sizes)
    check(shape, out, lhs, rhs, sizes, rng)


CONFIGURED = [
    (Shape(RAGGED_M, 6, 400, 576, 1040), [7, 0, 130, 65, 1, 150]),
    (Shape(RAGGED_M, 40, 300, 520, 640), [5, 0, 9, 16] * 10),
    (Shape(MASKED, 6, 150, 576, 1040), [7, 0, 130, 65, 1, 150]),
    (Shape(MASKED, 40, 24, 77, 640), [5, 0, 9, 24] * 10),
    (Shape(RAGGED_K, 5, 264, 520, 1280), [130, 0, 1, 128, 600]),
]


@pytest.mark.parametrize(("shape", "sizes"), CONFIGURED, ids=label)
def test_every_configuration_gives_the_same_bits(rng, shape, sizes):
    """Up to 60 candidates, the best ones among them: the first is checked, the others equal it."""
    configs = [config for config, _ in ranked(shape.problem("f32"), current_device())]
    others = rng.permutation(len(configs) - 20)[:40] + 20 if len(configs) > 20 else []
    configs = [*configs[:20], *(configs[i] for i in others)]
    compile_all([(shape.problem("f32"), config) for config in configs], progress=False)
    lhs, rhs = poison(shape, *shape.draw(), sizes)
    is_owned, first, different = owned(shape, sizes), None, []
    for config in configs:
        with compiler.override(config):
            out = jit_into_nan(shape, "f32")(lhs, rhs, sizes)
        if first is None:
            check(shape, out, lhs, rhs, sizes, rng)
            first = bits(out)[is_owned]
        num_different = int((bits(out)[is_owned] != first).sum())
        rest = 0 if shape.kind == MASKED else int(bits(out)[~is_owned].astype(bool).sum())
        if num_different or rest:
            different.append(f"{config}: {num_different} values differ, {rest} are not zero")
    assert len(configs) > 10
    assert not different, "\n".join([f"{len(different)} of {len(configs)} configurations:", *different[:20]])


def launch(shape, config, out_dtype, lhs, rhs, sizes, out_address):
    """Runs the kernel without XLA, its result at a device address."""
    from cuda.bindings import driver

    from benchmarks.raw_launch import BoundKernel

    rows_fastest = lambda x: jnp.array(x.scales.mT) if x.granularity == ROW_BLOCKS else x.scales
    operands = [lhs.values, rows_fastest(lhs), rhs.values, rows_fastest(rhs), jnp.asarray(sizes, jnp.int32)]
    jax.block_until_ready(operands)
    driver.cuCtxSetCurrent(driver.cuDevicePrimaryCtxRetain(0)[1])
    plan = compiler.build(shape.problem(out_dtype), config)
    kernel = BoundKernel(plan, [*(x.unsafe_buffer_pointer() for x in operands), out_address])
    kernel()
    (status,) = driver.cuCtxSynchronize()
    assert status == driver.CUresult.CUDA_SUCCESS
    kernel.unload()


@pytest.mark.parametrize(("shape", "sizes"), [
    (Shape(RAGGED_M, 5, 300, 576, 640), [60, 0, 100, 3, 77]),
    (Shape(RAGGED_M, 5, 301, 77, 640), [60, 0, 100, INT_MAX, INT_MIN]),
    (Shape(MASKED, 5, 100, 576, 640), [60, 0, 100, 3, 77]),
    (Shape(MASKED, 5, 101, 77, 640), [60, INT_MIN, 100, 3, INT_MAX]),
    (Shape(RAGGED_K, 4, 200, 576, 1280), [128, 300, 0, 129]),
    (Shape(RAGGED_K, 4, 201, 77, 1280), [128, INT_MAX, INT_MIN, 129]),
], ids=label)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_only_what_groups_own_is_written(rng, shape, sizes, out_dtype):
    """Sentinels stand in front of the output, behind it, and in the rows that a masked GEMM leaves alone."""
    lhs, rhs = poison(shape, *shape.draw(), sizes)
    expected = bits(jit_into_nan(shape, out_dtype)(lhs, rhs, sizes))
    configs = [config for config, _ in ranked(shape.problem(out_dtype), current_device())]
    configs = [configs[0], *(configs[i] for i in rng.permutation(len(configs))[:15])]
    compile_all([(shape.problem(out_dtype), config) for config in configs], progress=False)
    guard, num_rows = 64, int(np.prod(shape.out[:-1]))
    for config in configs:
        buffer = jnp.full((num_rows + 2 * guard, shape.n), SENTINEL, DTYPES[out_dtype]).block_until_ready()
        address = buffer.unsafe_buffer_pointer() + guard * shape.n * buffer.dtype.itemsize
        launch(shape, config, out_dtype, lhs, rhs, sizes, address)
        before, out, behind = np.split(np.asarray(buffer), [guard, guard + num_rows])
        out, is_owned = out.reshape(shape.out), owned(shape, sizes)
        assert (before == SENTINEL).all(), config
        assert (behind == SENTINEL).all(), config
        np.testing.assert_array_equal(bits(out)[is_owned], expected[is_owned], str(config))
        if shape.kind == MASKED:
            assert (out[~is_owned] == SENTINEL).all(), config
        elif shape.kind == RAGGED_M:
            assert not bits(out)[~is_owned].any(), config


@pytest.mark.parametrize("shape", [
    Shape(RAGGED_K, 4, 200, 576, 1280), Shape(RAGGED_K, 4, 130, 77, 1040)], ids=label)
def test_accumulates_in_place(rng, shape):
    sizes = [128, 300, 0, 129]
    lhs, rhs = poison(shape, *shape.draw(), sizes)
    accumulator = jax.random.normal(jax.random.key(3), shape.out) * 1e6
    start, address = np.asarray(accumulator), accumulator.unsafe_buffer_pointer()
    gemm = lambda a, x, w: fp8_gemm_ragged_k(x, w, jnp.array(sizes), accumulator=a, implementation="hopper")
    out = jax.jit(gemm, donate_argnums=0)(accumulator, lhs, rhs)
    assert out.unsafe_buffer_pointer() == address
    assert_groups_within_bound(out, lhs, rhs, sizes, kind=shape.kind, accumulator=start)
    alone = jit_into_nan(shape, "f32")(lhs, rhs, sizes)
    np.testing.assert_array_equal(bits(out), bits(start + np.asarray(alone)))


def nested(rest):
    """Sizes [2, 2, G], with `rest` as what there is to share out."""
    return [[[20, 0, 65, 1], [0, 0, 0, rest]], [[1, 2, 3, 4], [40] * 4]]


NESTED = {
    RAGGED_M: (Shape(RAGGED_M, 4, 170, 264, 272), nested(170)),
    MASKED: (Shape(MASKED, 4, 70, 264, 272), nested(70)),
    RAGGED_K: (Shape(RAGGED_K, 4, 70, 264, 640), nested(640)),
}


@pytest.mark.parametrize("kind", NESTED)
@pytest.mark.parametrize("shared", ["none", "lhs", "rhs"])
def test_nested_vmap_is_one_launch_with_the_bits_of_its_slices(kind, shared):
    shape, sizes = NESTED[kind]
    sizes = jnp.array(sizes)
    stack = lambda *leaves: jnp.stack(leaves).reshape(2, 2, *leaves[0].shape)
    draws = [shape.draw(seed=i) for i in range(4)]
    lhs, rhs = (jax.tree.map(stack, *(d[i] for d in draws)) for i in range(2))
    if shared == "lhs":
        lhs = draws[0][0]
    if shared == "rhs":
        rhs = draws[0][1]
    axes = (None if shared == "lhs" else 0, None if shared == "rhs" else 0, 0)
    gemm = partial(FUNCTIONS[kind], out_dtype=jnp.float32, implementation="hopper")
    compiled = jax.jit(jax.vmap(jax.vmap(gemm, axes), axes)).lower(lhs, rhs, sizes).compile()
    assert compiled.as_text().count('custom_call_target="jax_fp8gemm') == 1
    out = bits(compiled(lhs, rhs, sizes))
    for index in np.ndindex(2, 2):
        x, w = (array if axis is None else jax.tree.map(lambda leaf, index=index: leaf[index], array)
                for array, axis in zip((lhs, rhs), axes, strict=False))
        one = bits(gemm(x, w, sizes[index]))
        is_owned = owned(shape, np.asarray(sizes[index]))
        np.testing.assert_array_equal(out[index][is_owned], one[is_owned], str(index))


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_a_new_routing_in_a_recorded_program(rng, kind, driver_calls):
    """Several calls in one program, of which XLA makes a CUDA graph: other sizes compile and load nothing."""
    shape = Shape(kind, 8, 500, 576, 1024)
    lhs, rhs = shape.draw()
    gemm = partial(FUNCTIONS[kind], lhs, rhs, out_dtype=jnp.float32, implementation="hopper")
    step = jax.jit(lambda sizes: [gemm(jnp.roll(sizes, i)) for i in range(8)])
    one = jax.jit(gemm)
    for repeat in range(2):
        for sizes in routings(shape, rng).values():
            sizes = jnp.asarray(sizes, jnp.int32)
            driver_calls()
            outs = jax.block_until_ready(step(sizes))
            calls = driver_calls()
            if repeat > 0:
                assert calls["cuGraphLaunch"] == 1
                assert not {"cuLibraryLoadData", "cuModuleLoadData", "cuModuleLoadDataEx"} & calls.keys()
            for i, out in enumerate(outs):
                rolled = np.roll(sizes, i)
                is_owned = owned(shape, rolled)
                expected = bits(one(jnp.asarray(rolled)))
                np.testing.assert_array_equal(bits(out)[is_owned], expected[is_owned], f"{rolled}")
    assert step._cache_size() == one._cache_size() == 1


def tiled(shape, seed):
    """Operands too large to draw: one slab of values again and again, under scales that differ."""
    def repeat(size, granularity, seed):
        *leading, rows, k = size
        slab_rows, slab_k = min(rows, 4096), min(k, 16 * SCALE_BLOCK)
        slab = draw(seed, (slab_rows, slab_k), granularity, "positive").values
        tiles = *leading, ceil_div(rows, slab_rows), ceil_div(k, slab_k)
        values = jnp.tile(slab, tiles)[..., :rows, :k]
        blocks = *leading, ceil_div(rows, granularity[0]), ceil_div(k, SCALE_BLOCK)
        return ScaledArray(values, jax.random.uniform(jax.random.key(seed), blocks, minval=0.5), granularity)

    return (jax.jit(repeat, static_argnums=(0, 1, 2))(shape.lhs, ROW_BLOCKS, seed),
            jax.jit(repeat, static_argnums=(0, 1, 2))(shape.rhs, shape.rhs_granularity, seed + 1))


def few(groups, **sizes):
    """Zero for every group but those named g<index>."""
    return [sizes.get(f"g{g}", 0) for g in range(groups)]


LARGE = {
    "masked lhs": (Shape(MASKED, 300, 1024, 256, 7168), few(300, g0=3, g150=40, g298=1, g299=129)),
    "masked out": (Shape(MASKED, 300, 1024, 7168, 128), few(300, g1=1024, g298=1, g299=129)),
    "ragged M lhs": (Shape(RAGGED_M, 4, 310_000, 128, 7168), [200_000, 0, 99_000, 10_000]),
    "ragged M rhs": (Shape(RAGGED_M, 80, 1000, 4096, 7168), few(80, g0=100, g40=3, g79=800)),
    "ragged M out": (Shape(RAGGED_M, 4, 1_100_000, 2048, 128), [700_000, 1, 0, 399_000]),
    "ragged K lhs": (Shape(RAGGED_K, 4, 4096, 256, 4224 * 128), [100_000, 300_000, 0, 140_000]),
    "ragged K out": (Shape(RAGGED_K, 140, 4096, 4096, 1024), few(140, g0=5, g70=200, g139=129)),
}


@pytest.mark.parametrize("name", LARGE)
def test_more_than_31_bits_of_elements(name):
    """Groups at the ends of what 32-bit offsets reach have the bits of the dense GEMM of their operands."""
    shape, sizes = LARGE[name]
    assert max(np.prod(x, dtype=np.int64) for x in (shape.lhs, shape.rhs, shape.out)) > 2**31
    lhs, rhs = tiled(shape, 5)
    out_dtype = jnp.float32 if shape.kind == RAGGED_K else jnp.bfloat16
    options = {"out_dtype": out_dtype, "implementation": "hopper"}
    out = FUNCTIONS[shape.kind](lhs, rhs, jnp.array(sizes), **options)
    slices = group_slices(shape.kind, sizes, shape.limit)
    for g, s in enumerate(slices):
        if s.stop == s.start:
            continue
        ends = [s] if shape.kind == RAGGED_K else [
            slice(s.start, min(s.start + 64, s.stop)), slice(max(s.stop - 64, s.start), s.stop)]
        for part in ends:
            x, w, y = group_of(shape, g, part, lhs, rhs, out)
            expected = fp8_gemm(x, w, batch_invariant=True, **options)
            assert bool(jnp.isfinite(expected).all())
            np.testing.assert_array_equal(bits(y), bits(expected), f"group {g} at {part}")
    if shape.kind == RAGGED_M:
        assert not bool(jnp.any(out[slices[-1].stop :]))
    if shape.kind == RAGGED_K:
        is_empty = np.array([s.stop == s.start for s in slices])
        np.testing.assert_array_equal(np.asarray(jnp.any(out, axis=(1, 2)))[is_empty], False)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_a_group_has_the_bits_of_the_dense_gemm(rng, kind):
    shape = Shape(kind, 3, 200, 264, 1024)
    lhs, rhs = shape.draw()
    sizes = routings(shape, rng)["random"]
    out = jit_into_nan(shape, "bf16")(lhs, rhs, sizes)
    for g, s in enumerate(group_slices(kind, sizes, shape.limit)):
        x, w, y = group_of(shape, g, s, lhs, rhs, out)
        expected = fp8_gemm(x, w, batch_invariant=True, implementation="hopper")
        np.testing.assert_array_equal(bits(y), bits(expected))
