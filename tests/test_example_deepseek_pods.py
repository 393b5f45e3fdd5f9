"""Pods of examples/deepseek: what is read from XLA's text, the arithmetic of traffic, the prediction."""

import dataclasses
import json
import math
import pathlib

import pytest

from examples.deepseek import config, dispatch
from examples.deepseek.pods import __main__, collectives, compiled, expected, page, predict
from examples.deepseek.pods.collectives import Found, Traffic

DOCS = pathlib.Path(__file__).parents[1] / "docs"
REPORT = json.loads((DOCS / "pods.json").read_text())
V3 = page.pod_config(8, 64)
# Whole blocks of 128 on each device, of tokens, too; loops of more than one layer.
BLOCKS = dataclasses.replace(
    config.load("tiny"), sequence=128, batch=8, hidden=256, dense_layers=2, moe_layers=3, experts=8,
    expert_intermediate=256, dense_intermediate=256, nope_dim=112, rope_dim=16)


# ---- XLA's text


@pytest.mark.parametrize(("groups", "expected_group"), [
    ("{{0,4},{1,5},{2,6},{3,7}}", [0, 4]),
    ("[2,4]<=[8]", [0, 1, 2, 3]),
    ("[4,2]<=[2,4]T(1,0)", [0, 4]),
    ("mesh['a'=2,'b'=4] {'b'}", [0, 1, 2, 3]),
    ("mesh['a'=2,'b'=4] {'a','b'}", [*range(8)]),
    ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", [0, 4]),
])
def test_the_first_group_in_each_way_to_write_it(groups, expected_group):
    line = f"  %x = f32[4]{{0}} all-reduce(%y), channel_id=1, replica_groups={groups}, to_apply=%add"
    assert collectives.first_group(line, 8) == expected_group


@pytest.mark.parametrize("groups", ["mesh['a'=8] {'a':(2)4}", "something"])
def test_groups_that_are_not_understood_are_not_ignored(groups):
    with pytest.raises(ValueError, match="expected replica_groups, got %x"):
        collectives.first_group(f"%x = f32[] all-reduce(%y), replica_groups={groups}", 8)


TEXT = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (arg: (s32[], f32[3,8])) -> (s32[], f32[3,8]) {
  %w = f8e4m3fn[16,8]{1,0} all-gather(%v), channel_id=1, replica_groups={{0,4},{1,5},{2,6},{3,7}}, \
dimensions={0}, metadata={op_name="jit(step)/gather"}
  %g = f32[8,8]{1,0} reduce-scatter(%h), replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  %t = (u32[2,8]{1,0}, u32[2,8]{1,0}, /*index=2*/u32[2,8]{1,0}, u32[2,8]{1,0}) all-to-all(%a, %b, %c, %d), \
replica_groups={{0,1,2,3},{4,5,6,7}}
}

%condition (arg: (s32[], f32[3,8])) -> pred[] {
  %i = s32[] get-tuple-element(%arg), index=0
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (p: f32[3,8]) -> f32[3,8] {
  %loop = (s32[], f32[3,8]{1,0}, bf16[3,4]{1,0}, f32[8]{0}) while(%init), condition=%condition, body=%body
  %alone = f32[8]{0} all-reduce(%x), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  ROOT %all = (bf16[8]{0}, f32[]) all-reduce(%x, %y), replica_groups=[1,8]<=[8], to_apply=%add
}
"""


def test_collectives_of_a_loop_count_as_often_as_it_runs():
    found = collectives.read(TEXT, {"data": 2, "expert": 4, "tensor": 1})
    both = ("data", "expert")
    assert {each.traffic: each.source for each in found} == {
        Traffic("all-gather", "f8e4m3fn", 128, ("data",), 2, 3): "jit(step)/gather",
        Traffic("reduce-scatter", "f32", 128, ("data",), 2, 3): "",
        Traffic("all-to-all", "u32", 64, ("expert",), 4, 3): "",
        Traffic("all-reduce", "bf16", 8, both, 8, 1): "",
        Traffic("all-reduce", "f32", 1, both, 8, 1): "",
    }
    assert [each.traffic.bytes for each in found] == [16, 4, 3 * 128, 3 * 512, 3 * 256]


def test_a_group_of_a_part_of_an_axis_is_refused():
    with pytest.raises(ValueError, match="expected groups along whole axes"):
        collectives.read(TEXT, {"data": 4, "expert": 2})


def test_what_a_loop_carries():
    loop, = collectives.loops(TEXT)
    assert loop.trips == 3
    assert loop.arrays == [("s32", ()), ("f32", (3, 8)), ("bf16", (3, 4)), ("f32", (8,))]
    assert loop.stacked_bytes == 3 * 8 * 4 + 3 * 4 * 2


def test_a_loop_without_a_constant_count_is_refused():
    with pytest.raises(ValueError, match="expected a loop that counts up to a constant"):
        collectives.read(TEXT.replace("constant(3)", "parameter(1)"), {"data": 2, "expert": 4})


# ---- the arithmetic, against the compiler


@pytest.mark.parametrize("again", [False, True])
def test_a_compiled_step_communicates_and_holds_what_is_expected_to_the_byte(again):
    found = compiled.facts(dataclasses.replace(BLOCKS, remat_experts=again), 2, 4)
    # By hand: of 128 tokens a device has room for 2 * 128 * 2 / 4 from each sender. 4 * 128 rows of 256
    # features, 2 scales, 2 experts and 2 weights there; of sums, and of 2 weights' gradients back.
    assert found["bytes"]["tokens to experts, FP8"] == 3 * 512 * ((256 + 8 + 16) + (256 + 8))
    assert found["bytes"]["sums from experts, bf16"] == 3 * 512 * (512 + (512 + 8))
    # 512 rows of 2 * 256 gates and 256 results in bf16. Where they are not kept, the weights of 2 experts
    # come once more, 256 x 512 and 256 x 256, a byte each, and a scale for each 128 x 128.
    moe = expected.kept_bytes(BLOCKS, 2, 4)["moe"]
    assert found["kept"]["moe"] == moe - again * 3 * 512 * 2 * (512 + 256)
    weights = sum(traffic.bytes for traffic in expected.traffic(BLOCKS, 2, 4)["weights, FP8"])
    assert found["bytes"]["weights, FP8"] == weights + again * 3 * 2 * (256 * 768 + 4 * (8 + 4))


def test_large_arrays_travel_alone_as_expected(monkeypatch):
    for module in (dispatch, expected):
        monkeypatch.setattr(module, "LARGE_BYTES", 60_000)
    # Other sizes than those of other tests, or JAX would know the program.
    config = dataclasses.replace(BLOCKS, capacity_factor=1.5)
    found = compiled.facts(config, 2, 4)["bytes"]
    there = expected.traffic(config, 2, 4)["tokens to experts, FP8"]
    # 4 * 96 rows of 256 features and, together, of 2 scales, 2 experts and 2 weights.
    assert [(traffic.dtype, traffic.elements) for traffic in there[:2]] == [
        ("f8e4m3fn", 384 * 256), ("u32", 384 * 6)]
    assert found["tokens to experts, FP8"] == 3 * 384 * ((256 + 8 + 16) + (256 + 8))


def test_a_step_without_loops_is_refused():
    with pytest.raises(ValueError, match="unroll: expected loops over layers, got true"):
        compiled.facts(dataclasses.replace(BLOCKS, unroll=True), 2, 4)


def test_what_is_not_expected_is_named():
    wanted = {"weights": [Traffic("all-gather", "f8e4m3fn", 128, ("data",), 2, 3)]}
    silent = Traffic("all-gather", "f32", 128, ("data",), 2, 3)
    assert compiled.match([Found(wanted["weights"][0], "")], wanted) == {"weights": 384}
    message = r"(?s)not expected.*dtype='f32'.* of jit\(x\)/dot.*missing.*f8e4m3fn"
    with pytest.raises(ValueError, match=message):
        compiled.match([Found(silent, "jit(x)/dot")], wanted)
    with pytest.raises(ValueError, match="not expected"):
        compiled.match([Found(wanted["weights"][0], "")] * 2, wanted)


@pytest.mark.parametrize("mesh", REPORT["meshes"], ids=lambda mesh: f"{mesh['data']}x{mesh['expert']}")
def test_what_was_compiled_is_what_the_arithmetic_says(mesh):
    """The model may have changed since it was compiled: then `python -m examples.deepseek.pods` again."""
    sizes = mesh["data"], mesh["expert"]
    c = page.pod_config(*sizes)
    assert mesh["bytes"] == {purpose: sum(traffic.bytes for traffic in each)
                             for purpose, each in expected.traffic(c, *sizes).items()}
    assert mesh["state"] == expected.state_bytes(c, *sizes)
    assert mesh["kept"] == expected.kept_bytes(c, *sizes)


def test_meshes_have_64_to_512_devices():
    counts = [mesh["data"] * mesh["expert"] for mesh in REPORT["meshes"]]
    assert (min(counts), max(counts)) == (64, 512)
    assert counts == sorted(counts)


def test_tokens_of_v3_by_hand():
    """4096 tokens, 8 of 256 experts: 512 come from each of 64 devices to each on average, twice the room."""
    assert expected.message_rows(V3, 4096, 64) == expected.expert_rows(V3, 4096, 64) == 65_536
    found = expected.traffic(V3, 8, 64)["tokens to experts, FP8"]
    # Scales are large, too: 65,536 rows of 56 take 14 MB. Experts and weights are 4 MB, and travel together.
    assert [(traffic.dtype, traffic.bytes / 58 / 65_536) for traffic in found] == [
        ("f8e4m3fn", 7168), ("f32", 4 * 56), ("u32", 8 * 8), ("f8e4m3fn", 7168), ("f32", 4 * 56)]


def test_a_weight_travels_twice_as_a_byte_and_that_of_an_expert_three_times():
    weights = expected.traffic(V3, 8, 64)["weights, FP8"]
    values = [traffic for traffic in weights if traffic.dtype == "f8e4m3fn"]
    attention = 7168 * 2112 + 1536 * 24_576 + 512 * 32_768 + 16_384 * 7168
    dense, shared = 3 * 7168 * 18_432, 3 * 7168 * 2048
    assert sum(traffic.bytes for traffic in values) == (
        2 * (61 * attention + 3 * dense + 58 * shared) + 3 * 58 * 4 * shared)


def test_an_axis_of_one_device_carries_nothing():
    for c, data, expert, axis in ((page.pod_config(1, 64), 1, 64, "expert"), (BLOCKS, 2, 1, "data")):
        every = [traffic for each in expected.traffic(c, data, expert).values() for traffic in each]
        assert {traffic.axes for traffic in every} == {(axis,)}
        assert {traffic.devices for traffic in every} == {data * expert}


# ---- the prediction


def test_a_device_sends_what_a_ring_needs():
    assert Traffic("all-gather", "bf16", 80, ("data",), 8, 2).sent == 2 * 160 * 7 / 8
    assert Traffic("all-reduce", "f32", 80, ("data",), 8, 1).sent == 2 * 320 * 7 / 8


@pytest.mark.parametrize(("axes", "nearest", "in_node"), [
    (("expert",), "expert", 8), (("data",), "expert", 1), (("data", "expert"), "expert", 8),
    (("data",), "data", 4), (("expert",), "data", 2), (("data", "expert"), "data", 8),
])
def test_devices_of_a_node(axes, nearest, in_node):
    devices = math.prod({"data": 4, "expert": 64}[axis] for axis in axes)
    traffic = Traffic("all-reduce", "f32", 1, axes, devices, 1)
    assert predict.devices_in_node(traffic, 4, 64, nearest) == in_node


def test_links_carry_their_part():
    exchange = Traffic("all-to-all", "u32", 640, ("expert",), 64, 1)
    assert predict.link_bytes(exchange, 8) == (2560 * 7 / 64, 2560 * 56 / 64)
    gather = Traffic("all-gather", "u32", 640, ("data",), 8, 1)
    assert predict.link_bytes(gather, 1) == (0, gather.sent)
    assert predict.link_bytes(gather, 8) == (gather.sent, 0)
    reduce = Traffic("all-reduce", "f32", 640, ("expert",), 64, 1)
    assert predict.link_bytes(reduce, 8) == (reduce.sent, reduce.sent / 8)


RATES = predict.Rates(dense=1e15, experts=1e15, bf16=1e15, attention=1e15, f32=1e15, memory=1e12,
                      nvlink=dict.fromkeys(collectives.KINDS, 2e10), network=4e10)


def test_flops_of_a_token_are_six_for_each_active_parameter():
    """36.5 billion without the embedding; and a token sees 2048 others on average, in 61 layers."""
    scores = 3 * 61 * 2 * 2048 * 128 * (192 + 192)
    attention = 61 * (7168 * 2112 + 1536 * 24_576 + 512 * 32_768 + 16_384 * 7168)
    active = attention + 3 * 3 * 7168 * 18_432 + 58 * 9 * 3 * 7168 * 2048 + 7168 * 129_280
    assert round(active, -8) == 36_500_000_000
    assert predict.model_flops(V3) == 6 * active + scores


def test_bounds_of_a_step():
    step = predict.predict(V3, 8, 64, RATES)
    assert step.overlapped == max(step.compute, step.nvlink, step.network)
    # One after the other, but the two links of one collective at once.
    links = step.nvlink, step.network
    assert step.compute + max(links) < step.serial < step.compute + sum(links)
    assert step.compute == sum(predict.compute_seconds(V3, 8, 64, RATES).values())


def test_a_faster_network_makes_a_faster_step():
    faster = predict.predict(V3, 8, 64, dataclasses.replace(RATES, network=8e10))
    assert faster.network == pytest.approx(predict.predict(V3, 8, 64, RATES).network / 2)


def test_changes_act_on_what_they_name():
    steps = page.changed_steps(8, 64, RATES)
    networks = [step.network for step in steps.values()]
    assert len(steps) == 5
    assert networks[:3] == sorted(networks[:3], reverse=True)
    assert len({*networks}) == 5
    assert [step.tokens for step in steps.values()] == [4096] * 3 + [16_384] * 2


def test_rates_are_those_of_the_reports():
    """721.6 GFLOP in 694.19 us, and 406.8 MB in 138.803 us."""
    rates = predict.read_rates()
    assert rates.dense == pytest.approx(721_554_505_728 / 694.19e-6)
    assert rates.memory == pytest.approx(406_847_488 / 138.803e-6)


# ---- the page


def test_the_page_is_that_of_the_report():
    shown = (DOCS / "pods.md").read_text()
    start, end = (shown.index(marker) for marker in page.MARKERS)
    assert shown[start + len(page.MARKERS[0]) + 1 : end] == page.tables(REPORT, predict.read_rates())


def test_the_page_is_written_from_the_report_alone(tmp_path):
    (tmp_path / "pods.json").write_text(json.dumps(REPORT))
    (tmp_path / "pods.md").write_text("before\n" + "\n".join(page.MARKERS) + "\nafter\n")
    assert __main__.main(["--page-only", "--out", str(tmp_path)]) == 0
    first, last = page.MARKERS
    tables = page.tables(REPORT, predict.read_rates())
    assert (tmp_path / "pods.md").read_text() == f"before\n{first}\n{tables}{last}\nafter\n"
    assert (tmp_path / "pods.png").read_bytes().startswith(b"\x89PNG")


def test_the_figure_has_a_bar_for_each_mesh_and_kind():
    axes, = page.draw(REPORT, RATES).axes
    names = [text.get_text() for text in axes.get_xticklabels()]
    assert names == ["1 x 64", "2 x 32", "2 x 64", "4 x 64", "8 x 64"]
    heights = [bar.get_height() for bars in axes.containers for bar in bars]
    first = predict.predict(page.pod_config(1, 64), 1, 64, RATES)
    assert heights[::5] == [first.compute, first.nvlink, first.network, first.serial]
