"""Tables of measured winners: what an entry serves, whose table goes first, unusable entries."""

import dataclasses
import json

import pytest

from jax_fp8gemm.jit import tuned
from jax_fp8gemm.jit.choose import Choice, choose
from jax_fp8gemm.jit.config import GemmConfig
from jax_fp8gemm.jit.device import H200, KNOWN_DEVICES, find_device
from jax_fp8gemm.jit.legal import rejection
from jax_fp8gemm.jit.problem import GemmProblem

PROBLEM = GemmProblem(4096, 7168, 2048)
USERS, SHIPPED, OTHER = GemmConfig(128, 112, 6), GemmConfig(128, 128, 5), GemmConfig(128, 96, 6)


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """The paths of the user's and of the shipped table, both missing."""
    monkeypatch.setenv("JAX_FP8GEMM_CACHE_DIR", str(tmp_path / "cache"))
    shipped = tmp_path / "shipped" / "nvidia-h200.json"
    shipped.parent.mkdir()
    monkeypatch.setattr(tuned, "shipped_table", lambda device: shipped.with_name(f"{device.slug}.json"))
    return tuned.user_table(H200), shipped


def entry(config, microseconds=10.0, **facts):
    return tuned.Entry(dataclasses.replace(PROBLEM, **facts), config, microseconds)


def test_buckets():
    sizes = (1, 8, 9, 16, 57, 64, 65, 80, 81, 128, 129, 160, 2049, 3585, 4096, 4097)
    assert [tuned.bucket(m) for m in sizes] == [
        8, 8, 16, 16, 64, 64, 80, 80, 96, 128, 160, 160, 2560, 4096, 4096, 5120]
    for m in range(1, 10000):
        assert m <= tuned.bucket(m) <= max(m + 7, 1.25 * m)
        assert tuned.bucket(tuned.bucket(m)) == tuned.bucket(m)


def test_users_table_goes_before_the_shipped_one_and_both_before_the_model(tables):
    users, shipped = tables
    assert choose(PROBLEM, H200).source == "model"
    tuned.add(shipped, H200, [entry(SHIPPED)])
    assert choose(PROBLEM, H200) == Choice(SHIPPED, "shipped table")
    tuned.add(users, H200, [entry(USERS)])
    assert choose(PROBLEM, H200) == Choice(USERS, "your table")


def test_the_exact_m_goes_before_the_nearest_in_the_bucket(tables):
    users, shipped = tables
    tuned.add(users, H200, [entry(USERS, m=4000), entry(OTHER, m=3600)])
    for m, config in ((3999, USERS), (4096, USERS), (3601, OTHER), (3600, OTHER)):
        assert choose(dataclasses.replace(PROBLEM, m=m), H200).config == config
    assert choose(dataclasses.replace(PROBLEM, m=4097), H200).source == "model"
    tuned.add(shipped, H200, [entry(SHIPPED)])
    assert choose(PROBLEM, H200) == Choice(SHIPPED, "shipped table")


@pytest.mark.parametrize(("facts", "serves"), [
    ({"lhs_dtype": "e5m2"}, True), ({"rhs_dtype": "e5m2"}, True), ({"rhs_batched": False}, True),
    ({"n": 7040}, False), ({"k": 1920}, False), ({"batch": 2}, False), ({"out_dtype": "f32"}, False),
    ({"rhs_scale_rows": 1}, False), ({"batch_invariant": True}, True),
    ({"out_dtype": "f32", "accumulate": True}, False),
])
def test_an_entry_serves_what_takes_as_long(tables, facts, serves):
    tuned.add(tables[0], H200, [entry(USERS)])
    assert (choose(dataclasses.replace(PROBLEM, **facts), H200).source == "your table") == serves


def test_a_batch_invariant_problem_passes_over_split_k(tables, caplog):
    invariant = dataclasses.replace(PROBLEM, m=64, batch_invariant=True)
    split = GemmConfig(64, 128, 8, split_k=2)
    tuned.add(tables[0], H200, [entry(split, m=64)])
    tuned.add(tables[1], H200, [entry(SHIPPED, m=57)])
    assert choose(dataclasses.replace(invariant, batch_invariant=False), H200).config == split
    assert caplog.text == ""
    assert choose(invariant, H200) == Choice(SHIPPED, "shipped table")
    assert caplog.text == ""


H100, UNKNOWN = find_device("NVIDIA H100 80GB HBM3"), find_device("NVIDIA GH200 480GB", 132)


def test_a_gpu_with_the_same_sms_takes_the_shipped_winners_after_its_own(tables):
    users, shipped = tables
    tuned.add(users, H200, [entry(USERS)])
    assert choose(PROBLEM, H100).source == "model", "another GPU's table of the user's"
    tuned.add(shipped, H200, [entry(SHIPPED)])
    for device in (H100, UNKNOWN):
        assert choose(PROBLEM, device) == Choice(SHIPPED, "shipped table of the NVIDIA H200")
    near = dataclasses.replace(PROBLEM, m=4000)
    tuned.add(tuned.shipped_table(H100), H100, [entry(OTHER, m=4000)])
    assert choose(near, H100) == Choice(OTHER, "shipped table")
    assert choose(PROBLEM, H100).config == SHIPPED, "the exact M goes before the nearest"
    tuned.add(tuned.user_table(H100), H100, [entry(USERS)])
    assert choose(PROBLEM, H100) == Choice(USERS, "your table")


@pytest.mark.parametrize("device", [
    find_device("NVIDIA H100 PCIe"), find_device("NVIDIA H20"), find_device("NVIDIA GH200 480GB", 114),
    H100.limited_to(100)], ids=str)
def test_a_gpu_with_other_sms_does_not_take_them(tables, device):
    tuned.add(tables[1], H200, [entry(SHIPPED)])
    assert choose(PROBLEM, device).source == "model"


def test_a_limited_device_has_no_measurements(tables):
    tuned.add(tables[0], H200, [entry(USERS)])
    assert choose(PROBLEM, H200.limited_to(100)).source == "model"


def test_an_illegal_entry_is_ignored_with_a_log_line(tables, caplog):
    users, shipped = tables
    tuned.add(users, H200, [entry(GemmConfig(128, 256, 4))])
    tuned.add(shipped, H200, [entry(SHIPPED)])
    assert choose(PROBLEM, H200) == Choice(SHIPPED, "shipped table")
    assert "your table" in caplog.text
    assert "is illegal" in caplog.text
    assert "registers" in caplog.text


@pytest.mark.parametrize("record", [
    {}, {"problem": {"m": 1, "n": 8, "k": 128}, "microseconds": 1}, [], "text",
    {"problem": {"m": 0, "n": 8, "k": 128}, "config": {"block_m": 64, "block_n": 64, "num_stages": 4},
     "microseconds": 1},
    {"problem": {"m": 64.0, "n": 8, "k": 128}, "config": {"block_m": 64, "block_n": 64, "num_stages": 4},
     "microseconds": 1},
    {"problem": {"m": 1, "n": 8, "k": 128}, "config": {"block_m": 64, "warp": 3}, "microseconds": 1},
    {"problem": {"m": 1, "n": 8, "k": 128}, "config": {"block_m": "64", "block_n": 64, "num_stages": 4},
     "microseconds": 1},
    {"problem": {"m": 1, "n": 8, "k": 128}, "config": {"block_m": 64, "block_n": 64, "num_stages": 4},
     "microseconds": "fast"},
], ids=["empty", "no config", "list", "text", "problem", "fraction", "unknown field", "text for a number",
        "time"])
def test_a_malformed_entry_is_ignored_and_the_rest_is_used(tables, record, caplog):
    users, _ = tables
    users.parent.mkdir(parents=True)
    users.write_text(json.dumps({"device": "NVIDIA H200", "entries": [record, entry(USERS).to_json()]}))
    assert choose(PROBLEM, H200) == Choice(USERS, "your table")
    assert "ignored" in caplog.text


@pytest.mark.parametrize("text", ["", "{", "[]", '{"device": "x"}', '{"entries": 3}', "\x00"])
def test_a_broken_table_is_ignored_and_the_next_measurement_mends_it(tables, text, caplog):
    users, _ = tables
    users.parent.mkdir(parents=True)
    users.write_text(text)
    assert choose(PROBLEM, H200).source == "model"
    assert "ignored" in caplog.text
    tuned.add(users, H200, [entry(USERS)])
    assert choose(PROBLEM, H200).config == USERS


def test_add_keeps_others_and_replaces_the_same_problem(tables):
    users, _ = tables
    tuned.add(users, H200, [entry(USERS), entry(OTHER, n=4096)])
    tuned.add(users, H200, [entry(SHIPPED, 8.125)])
    assert tuned.load(users) == (entry(OTHER, n=4096), entry(SHIPPED, 8.125))
    assert [path.name for path in sorted(users.parent.iterdir())] == ["nvidia-h200.json", "nvidia-h200.lock"]


def test_json_has_only_what_differs_from_the_defaults():
    record = entry(dataclasses.replace(USERS, swap_ab=True), batch=4).to_json()
    assert record == {"problem": {"m": 4096, "n": 7168, "k": 2048, "batch": 4},
                      "config": {"block_m": 128, "block_n": 112, "num_stages": 6, "swap_ab": True},
                      "microseconds": 10.0}
    assert tuned.Entry.from_json(record).config.swap_ab is True


def test_shipped_tables_are_valid_and_legal(caplog):
    paths = {path.name: path for path in tuned.shipped_table(H200).parent.glob("*.json")}
    assert set(paths) <= {f"{device.slug}.json" for device in KNOWN_DEVICES}
    assert "nvidia-h200.json" in paths
    for device in KNOWN_DEVICES:
        path = paths.get(f"{device.slug}.json")
        if path is None:
            continue
        entries = tuned.load(path)
        assert json.loads(path.read_text())["device"] == device.name
        assert len({e.problem for e in entries}) == len(entries)
        assert len(entries) == len(json.loads(path.read_text())["entries"]), "none was ignored"
        for e in entries:
            assert rejection(e.problem, e.config, device) is None
            assert e.microseconds > 0.5
    assert caplog.text == ""
