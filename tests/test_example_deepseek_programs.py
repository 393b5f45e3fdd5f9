"""The programs of examples/deepseek: training from the command line, comparing runs, drawing."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from examples.deepseek import compare, config, log, plot, report, train
from examples.deepseek.config import Config

ROOT = pathlib.Path(__file__).parents[1]
TEXT = pathlib.Path(json.__file__).parents[1] / "email"  # one small package of the standard library
# One layer of each kind, as small as the text allows: most of the time would be XLA's.
SMALLEST = {"moe_layers": 1, "hidden": 32, "dense_intermediate": 32, "expert_intermediate": 32, "batch": 2,
            "sequence": 16, "remat": False, "validation_every": 2, "warmup": 1}


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs train.py with the smallest model; returns the folder of its runs."""
    monkeypatch.setenv("XLA_FLAGS", "")  # what the program sets is of no use here any more
    path = tmp_path / "smallest.json"
    path.write_text(json.dumps(dataclasses.asdict(config.load("tiny", SMALLEST))))

    def run(*arguments):
        common = ["--config", str(path), "--text", str(TEXT), "--out", str(tmp_path / "runs")]
        assert train.main([*common, *arguments]) == 0
        return tmp_path / "runs"

    jax.config.update("jax_disable_most_optimizations", True)
    yield run
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", False)


def test_the_command_line_trains_interrupts_and_resumes(command, capsys, tmp_path):
    folder = command("--steps", "5", "--minutes", "0.00001")
    assert not (folder / "bf16-0").exists(), "the time is up before the first run"
    command("--steps", "3", "--checkpoint-every", "2")
    folder = command("--steps", "9", "--resume", "--checkpoint-every", "0")
    run = log.read(folder / "bf16-0")
    assert [step["step"] for step in run.steps] == list(range(1, 10))
    # Every second step, where the first call ended, and at the end.
    assert [step["step"] for step in run.steps if "validation_loss" in step] == [2, 3, 4, 6, 8, 9]
    assert run.identity["seed"] == 0
    for step in run.steps:
        assert step["tokens_per_s"] == pytest.approx(2 * 16 / step["seconds"])
        assert np.sum(step["load"]) == 2 * 2 * 16
    assert [path.name for path in (folder / "bf16-0/checkpoints").iterdir()] == ["3"]
    printed = capsys.readouterr()
    assert re.search(r"bf16-0: 9 steps, loss \d\.\d{4}, the first took \d+\.\d s, the median \d+\.\d ms$",
                     printed.out, re.M)
    assert re.search(r"bf16 seed 0: 100%.*9/9 .*loss=\d\.\d{4}, tokens_per_s=\d", printed.err)

    with pytest.raises(ValueError, match=r"bf16-0: expected no run there, got one; resume it, or"):
        command("--steps", "9")
    with pytest.raises(ValueError, match=r"expected to resume the same run, got other config\.batch: 2, 3"):
        command("--steps", "9", "--resume", "--set", "batch=3")


def test_two_processes_train_as_one_with_two_devices(tmp_path, command):
    """Each has one device of the mesh, and the first one writes the log; what is learned is the same."""
    mesh = ("--mesh", "expert=2", "--steps", "3", "--precision", "fp8", "--checkpoint-every", "2")
    alone = log.read(command(*mesh) / "fp8-0")
    assert alone.environment["mesh"] == {"data": 1, "expert": 2, "tensor": 1}
    (tmp_path / "runs").rename(tmp_path / "alone")
    launched = launch_two(tmp_path, *mesh)
    assert launched.returncode == 0, launched.stderr
    together = log.read(tmp_path / "runs/fp8-0")
    assert together.environment["processes"] == 2
    for name in ("step", "loss", "gradient_norm", "load", "dropped"):
        np.testing.assert_array_equal(together.column(name), alone.column(name))
    assert [step.get("digest") for step in together.steps] == [step.get("digest") for step in alone.steps]
    assert launched.stdout.count("fp8-0: 3 steps") == 1


@pytest.mark.parametrize(("arguments", "message"), [
    (["--distributed", "--minutes", "5"], "--minutes: expected one process, whose clock it is; give several"),
    (["--distributed"], "--mesh: expected, with --distributed, sizes that take all devices of all processes"),
    (["--mesh", "foo=2"], "--mesh: expected each of data, expert, tensor once at most, got foo"),
    (["--mesh", "data=2", "data=4"], "--mesh: expected each of data, expert, tensor once at most, got data"),
    (["--mesh", "data=1.5"], "--mesh: data: expected a whole number, got 1.5"),
    (["--mesh", "data=true"], "--mesh: data: expected a whole number, got True"),
    (["--mesh", "expert"], "--mesh: expert: expected a whole number, got ''"),
    (["--mesh", "expert=16"], "mesh: expected sizes of at least 1 and at most 8 devices"),
    (["--mesh", "data=3"], "Config: batch: expected a multiple of 3, the size of the mesh axis"),
    (["--steps", "0"], "argument --steps: expected a whole number of at least 1, got '0'"),
    (["--set", "capacity_factor=0.5"], "Config: capacity_factor: expected at least 1, got 0.5"),
])
def test_arguments_that_make_no_sense_are_named(command, capsys, arguments, message):
    with pytest.raises(SystemExit):
        command(*arguments)
    assert message in capsys.readouterr().err


def launch_two(tmp_path, *arguments, outs=("runs", "runs")):
    """Two processes of train.py, of which each has a folder of its own."""
    program = [sys.executable, "-m", "examples.deepseek.train", "--distributed", *arguments,
               "--config", str(tmp_path / "smallest.json"), "--text", str(TEXT)]
    out = f'if [ "$OMPI_COMM_WORLD_RANK" = 0 ]; then out={outs[0]}; else out={outs[1]}; fi'
    script = f'{out}; exec "$@" --out {tmp_path}/$out'
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", "jax_fp8gemm", "launch", "--processes", "2", "sh", "-c", script, "sh",
         *program], cwd=ROOT, env=environment, timeout=600, capture_output=True, text=True)


def test_processes_that_share_no_folder_end_at_once(tmp_path, command):
    launched = launch_two(tmp_path, "--mesh", "expert=2", "--steps", "3", outs=("runs", "others"))
    assert launched.returncode != 0
    assert "--out: expected a folder that all processes share" in launched.stderr
    assert "in which processes [1] do not see what the first writes" in launched.stderr
    assert not (tmp_path / "runs/fp8-0").exists()


def test_a_wrong_setting_is_refused_before_anything_is_trained(command, capsys):
    with pytest.raises(SystemExit):
        command("--set", "hiden=64")
    assert "expected the fields of Config, got unknown or no ['hiden']" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command("--precision", "fp4")


def record(folder, precision, seed, losses, *, seconds=0.5, validation=1.0, batch=4):
    """A run with these losses, in the form that train.py writes."""
    fields = dataclasses.asdict(config.load("tiny", {"batch": batch}))
    folder = folder / f"{precision}-{seed}"
    log.begin(folder, {"precision": precision, "seed": seed, "config": fields, "text": "abc"},
              {"device": "a GPU", "versions": {"jax": "1.2.3"}})
    with log.open_steps(folder) as file:
        for number, loss in enumerate(losses, 1):
            is_last = {"validation_loss": validation, "digest": 5} if number == len(losses) else {}
            # The first steps are slow ones, which the median leaves out.
            log.append(file, {"step": number, "loss": loss, "gradient_norm": 1.0, "load": [[3, 1], [2, 2]],
                              "seconds": 9.0 if number <= train.UNTIMED_STEPS else seconds,
                              "tokens_per_s": 1.0, **is_last})


def losses(rng, steps=60):
    return 2 + np.exp(-np.arange(steps) / 10) + 0.1 * rng.standard_normal(steps)


@pytest.fixture
def runs(tmp_path, rng):
    """Two seeds; FP8 is 0.2 % worse in one, 0.1 % better in the other, with noise that smoothing averages."""
    for seed, factor in ((0, 1.002), (1, 0.999)):
        bf16 = losses(rng)
        noise = np.tile([0.01, -0.01], len(bf16) // 2)
        record(tmp_path, "bf16", seed, bf16)
        record(tmp_path, "fp8", seed, factor * bf16 + noise, seconds=0.25, validation=1.01)
    return tmp_path


def test_a_report_has_the_differences_of_smoothed_losses(runs):
    found = report.make_report(runs, window=20)
    assert found["within"]
    assert found["start"] == 25, "five steps of warm-up, then a window"
    assert found["differences"]["0"]["last"] == pytest.approx(0.002, rel=1e-6)
    assert found["differences"]["1"]["largest"] == pytest.approx(-0.001, rel=1e-6)
    assert found["differences"]["mean"]["last"] == pytest.approx(0.0005, rel=1e-6)
    assert len(report.relative_difference(found, 0)) == 60 - 25 + 1
    assert [run["median_seconds"] for run in found["runs"]] == [0.5, 0.25, 0.5, 0.25]
    assert found["runs"][0]["imbalance"] == [1.5] * 60
    assert report.make_report(runs, window=20, limit=0.0019)["within"] is False
    text = compare.table(found)
    assert "| 0 | 2.0" in text
    assert "| +0.200% | +0.200% | 1.0000 | 1.0100 | 500.0 | 250.0 | 2.00x |" in text
    assert "FP8's smoothed loss stays within 0.25% of bf16's for every seed." in text


def test_a_difference_in_the_middle_is_found(tmp_path, rng):
    bf16 = losses(rng)
    fp8 = bf16.copy()
    fp8[20:40] *= 1.004  # one window, which begins after the warm-up
    record(tmp_path, "bf16", 0, bf16)
    record(tmp_path, "fp8", 0, fp8)
    found = report.make_report(tmp_path, window=20)
    assert not found["within"]
    assert found["differences"]["0"]["largest"] == pytest.approx(0.004, rel=1e-6)
    assert found["differences"]["0"]["last"] == 0
    assert "does not stay within 0.25%" in compare.table(found)


def test_runs_that_do_not_compare_are_refused(tmp_path, rng):
    with pytest.raises(ValueError, match="expected runs of train, got none"):
        report.make_report(tmp_path)
    record(tmp_path, "bf16", 0, losses(rng))
    with pytest.raises(ValueError, match="expected both precisions of every seed, got no fp8-0"):
        report.make_report(tmp_path)
    record(tmp_path, "fp8", 0, losses(rng, 40))
    with pytest.raises(ValueError, match="expected runs of equal length, got 60 and 40 steps"):
        report.make_report(tmp_path)
    record(tmp_path, "fp8", 0, losses(rng), batch=8)
    with pytest.raises(ValueError, match=r"differ in seed and precision alone, got config.batch: 4, 8"):
        report.make_report(tmp_path)
    record(tmp_path, "fp8", 0, losses(rng))
    with pytest.raises(ValueError, match="at least 65 steps, the warm-up and a window of 60, got 60"):
        report.make_report(tmp_path, window=60)


def test_compare_writes_report_figure_and_page(runs, capsys):
    text = compare.table(report.make_report(runs, window=20))
    arguments = [str(runs), "--window", "20", "--out", str(runs / "docs")]
    assert compare.main(arguments) == 0
    assert text in capsys.readouterr().out
    assert (runs / "docs/training.png").read_bytes().startswith(b"\x89PNG")
    # A page of its own; then one that is there, whose table is replaced.
    page, (first, last) = runs / "docs/training.md", compare.MARKERS
    own = page.read_text()
    assert own.startswith(f"{first}\n{text}\n![")
    assert own.endswith(f"(training.png)\n{last}\n")
    page.write_text(f"before\n{first}\nold\n{last}\nafter\n")
    assert compare.main([*arguments, "--limit", "0.001"]) == 1
    assert page.read_text() == f"before\n{own}after\n".replace(
        text, compare.table(report.make_report(runs, window=20, limit=0.001)))
    with pytest.raises(ValueError, match="expected one <!-- training:start -->"):
        compare.insert("no markers", text)
    # The figure again, from the report alone.
    assert plot.main([str(runs / "docs/training.json"), str(runs / "again.png")]) == 0
    assert (runs / "again.png").read_bytes() == (runs / "docs/training.png").read_bytes()


def test_a_figure_shows_what_the_report_has(runs):
    found = json.loads(json.dumps(report.make_report(runs)))
    curves, differences, speed, balance = plot.draw(found).axes
    lines = [line for line in curves.lines if len(line.get_xdata()) == 41]  # means of 20 of 60 steps
    assert len(lines) == 4
    np.testing.assert_allclose(lines[0].get_ydata()[-1], np.mean(found["runs"][0]["loss"][-20:]))
    assert lines[0].get_xdata()[-1] == 60
    np.testing.assert_allclose(differences.lines[0].get_ydata(), 0.2, rtol=1e-6)
    assert [bar.get_height() for bar in speed.patches] == pytest.approx([0.512, 1.024] * 2)
    assert all((line.get_ydata() == 1.5).all() for line in balance.lines)
    plot.plt.close("all")


def test_identical_runs_are_told_from_others(tmp_path, rng, capsys):
    values = losses(rng)
    other = values.copy()
    other[41] = np.nextafter(other[41], 3)
    for name, of_run in (("a", values), ("b", values), ("c", other)):
        record(tmp_path / name, "bf16", 0, of_run, seconds=ord(name))
    a, b, c = (str(tmp_path / name / "bf16-0") for name in "abc")
    assert compare.main(["--identical", a, b]) == 0
    assert compare.main(["--identical", a, c]) == 1
    assert capsys.readouterr().out == "identical\ndifferent: step 42: loss\n"
    with pytest.raises(SystemExit):
        compare.main([])


def test_a_record_is_cut_to_its_checkpoint(tmp_path, rng):
    record(tmp_path, "bf16", 0, losses(rng))
    folder = tmp_path / "bf16-0"
    with log.open_steps(folder) as file:
        file.write('{"step": 61, "lo')  # where the process ended
    assert log.last_step(folder) == 60
    log.cut(folder, 12)
    assert [step["step"] for step in log.read(folder).steps] == list(range(1, 13))
    with pytest.raises(ValueError, match="expected the 13 steps of the checkpoint, got 12"):
        log.cut(folder, 13)


def test_the_page_has_a_place_for_the_table():
    assert "the table" in compare.insert((ROOT / "docs/training.md").read_text(), "the table")


def test_the_readme_has_the_presets():
    text = (ROOT / "examples/deepseek/README.md").read_text()
    for name, preset in config.PRESETS.items():
        row = re.search(rf"^\| `{name}` \|(.*)\|$", text, re.M)
        cells = [cell.strip().replace(",", "") for cell in row.group(1).split("|")]
        shown = [preset.hidden, preset.layers, preset.experts, preset.experts_per_token, preset.sequence]
        assert cells[: len(shown)] == [str(value) for value in shown]


def test_every_field_of_the_configuration_is_documented():
    fields = {field.name for field in dataclasses.fields(Config)}
    documented = set(re.findall(r"\w+", " ".join(re.findall(r"^      ([\w, ]+):", Config.__doc__, re.M))))
    assert documented == fields
