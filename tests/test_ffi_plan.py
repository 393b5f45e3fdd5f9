"""The C++ side reads launch plans as jit/launch.py wrote them, and refuses malformed ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_fp8gemm import ffi
from jax_fp8gemm.jit import launch
from jax_fp8gemm.jit.launch import LaunchPlan, Pointer, Scalar, TensorMap

buffers = st.integers(0, 1024)


@st.composite
def tensor_maps(draw):
    rank = draw(st.integers(1, launch.MAX_RANK))
    numbers = lambda low, high, count: tuple(
        draw(st.lists(st.integers(low, high), min_size=count, max_size=count))
    )
    return TensorMap(
        buffer=draw(buffers),
        dtype=draw(st.sampled_from(("u8", "bf16", "f32"))),
        shape=numbers(1, 2**20, rank),  # with these strides, five dimensions stay within 64 bits
        strides=numbers(0, 2**40 - 1, rank - 1),
        box=numbers(1, 256, rank),
        swizzle=draw(st.sampled_from((0, 32, 64, 128))),
        lead=draw(st.integers(0, 2**40 - 1)),
    )


@st.composite
def plans(draw):
    cluster = draw(st.sampled_from(((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 8), (4, 2, 2), (16, 1, 1))))
    clusters = draw(st.tuples(st.integers(0, 2**26), st.integers(0, 8000), st.integers(0, 8000)))
    return LaunchPlan(
        cubin=b"",
        entry=draw(st.from_regex(r"[a-z_][a-z0-9_]{0,20}", fullmatch=True)),
        grid=tuple(c * n for c, n in zip(cluster, clusters, strict=True)),
        cluster=cluster,
        block=draw(st.integers(1, 1024)),
        shared_bytes=draw(st.integers(0, 2**20)),
        arguments=tuple(
            draw(
                st.lists(
                    st.one_of(
                        st.builds(Pointer, buffers),
                        st.builds(Scalar, st.integers(0, 2**32 - 1)),
                        tensor_maps(),
                    )
                )
            )
        ),
    )


def attributes(plan):
    """What Instantiate decodes; the cubin is the driver's to read."""
    return {name: value for name, value in plan.attributes().items() if name != "cubin"}


def decoded(plan):
    """The plan, rebuilt from what the C++ side makes of its attributes."""
    fields = ffi.describe_plan(**attributes(plan))
    arguments = tuple(
        getattr(launch, argument.pop("kind"))(**argument) for argument in fields.pop("arguments")
    )
    return LaunchPlan(cubin=plan.cubin, arguments=arguments, **fields)


@settings(deadline=None, max_examples=300)
@given(plans())
def test_round_trip(plan):
    assert decoded(plan) == plan


TENSOR_MAP = TensorMap(0, "u8", (256, 300), (256,), (128, 64), 128)
PLAN = LaunchPlan(b"", "fp8_gemm", (4, 1, 1), (2, 1, 1), 384, 1000, (Pointer(1), TENSOR_MAP))


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, -2, "grid: expected 0 to 2147483647, got -2"),
        (0, 3, r"grid: expected whole clusters of \(2, 1, 1\), got \(3, 1, 1\)"),
        (1, 65536, "grid: expected 0 to 65535, got 65536"),
        (3, 0, "cluster: expected 1 to 16, got 0"),
        (4, 9, r"cluster: expected at most 16 CTAs, got \(2, 9, 1\)"),
        (6, 1025, "block: expected 1 to 1024, got 1025"),
        (7, 2**40, "shared_bytes: expected 0 to 1048576, got 1099511627776"),
    ],
)
def test_malformed_launch(index, value, message):
    fields = attributes(PLAN)
    fields["launch"][index] = value
    with pytest.raises(ValueError, match=f"malformed launch plan: {message}"):
        ffi.describe_plan(**fields)


@pytest.mark.parametrize(
    ("argument", "index", "value", "message"),
    [
        (0, 0, 3, r"kind: expected 0 to 2, got 3 \(argument 0\)"),
        (0, 1, -1, r"buffer: expected 0 to 1024, got -1 \(argument 0\)"),
        (1, 1, 2**40, r"buffer: expected 0 to 1024, got 1099511627776 \(argument 1\)"),
        (1, 2, 3, "dtype: expected 0 to 2, got 3"),
        (1, 3, 6, "rank: expected 1 to 5, got 6"),
        (1, 3, 0, "rank: expected 1 to 5, got 0"),
        (1, 4, 0, "shape: expected 1 to 4294967296, got 0"),
        (1, 9, -256, "strides: expected 0 to 1099511627775, got -256"),
        (1, 15, 257, "box: expected 1 to 256, got 257"),
        (1, 19, 48, "swizzle: expected 0, 32, 64 or 128, got 48"),
        (1, 20, -16, "lead: expected 0 to 1099511627775, got -16"),
    ],
)
def test_malformed_argument(argument, index, value, message):
    fields = attributes(PLAN)
    fields["arguments"].reshape(2, -1)[argument, index] = value
    with pytest.raises(ValueError, match=f"malformed launch plan: {message}"):
        ffi.describe_plan(**fields)


def test_scalar_of_more_than_32_bits():
    for value in (-1, 2**32):
        fields = attributes(LaunchPlan(b"", "e", (1, 1, 1), (1, 1, 1), 32, 0, (Scalar(value),)))
        with pytest.raises(ValueError, match=f"value: expected 0 to 4294967295, got {value}"):
            ffi.describe_plan(**fields)


def test_extent_of_more_than_64_bits():
    plan = LaunchPlan(
        b"", "e", (1, 1, 1), (1, 1, 1), 32, 0, (TensorMap(0, "f32", (1, 2**32), (2**40 - 1,), (1, 1), 0),)
    )
    with pytest.raises(ValueError, match=r"f32 tensor map over buffer 0: shape \(1, 4294967296\).*64 bits"):
        ffi.describe_plan(**attributes(plan))


def test_wrong_sizes():
    fields = attributes(PLAN)
    with pytest.raises(ValueError, match="launch: expected 8 numbers, got 7"):
        ffi.describe_plan(**{**fields, "launch": fields["launch"][:7]})
    with pytest.raises(ValueError, match="arguments: expected records of 21 numbers, got 41 numbers"):
        ffi.describe_plan(**{**fields, "arguments": fields["arguments"][:41]})
    with pytest.raises(ValueError, match="entry: expected the name of a kernel, got nothing"):
        ffi.describe_plan(**{**fields, "entry": ""})


def test_only_int64():
    fields = attributes(PLAN)
    with pytest.raises(TypeError):
        ffi.describe_plan(**{**fields, "launch": fields["launch"].astype(np.float32)})
