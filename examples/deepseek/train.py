"""Trains the model, in one precision or several, from one seed or several, one run after the other.

    python -m examples.deepseek.train --config tiny                       # on a CPU, in a minute
    python -m examples.deepseek.train --config small --precision bf16 fp8 --seed 0 1 2 --out runs/small
    python -m examples.deepseek.train --config small --precision fp8 --mesh data=2 expert=4   # eight devices

One process for each device, on one host or on several:

    python -m jax_fp8gemm launch --processes 8 python -m examples.deepseek.train --distributed --mesh expert=8
    srun --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 \\
        python -m examples.deepseek.train --distributed --mesh data=2 expert=8 --config small

Runs are DIR/PRECISION-SEED, each with its log and its checkpoints. Those of one precision share a compiled
step. A run resumes where its last checkpoint was, and goes on bit for bit as if it had not been interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import itertools
import math
import os
import pathlib
import statistics
import time

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from examples.deepseek import config as configs
from examples.deepseek import log
from examples.deepseek.arguments import add_mesh, layout_of, named_value, positive
from examples.deepseek.checkpoint import Checkpoints
from examples.deepseek.config import Config
from examples.deepseek.data import Corpus, Sampler, read_corpus
from examples.deepseek.mesh import ONE_DEVICE, Layout, check
from examples.deepseek.precision import PRECISIONS, REFERENCE
from examples.deepseek.step import TrainState, digest, init, train_step, validation_loss
from jax_fp8gemm import check_hosts

# A step of the first few is not timed: compilation, and the GPU's clock.
UNTIMED_STEPS = 5
_PACKAGES = ("jax", "jax-fp8gemm", "optax", "orbax-checkpoint")


@dataclasses.dataclass(frozen=True)
class Limits:
    """How far a call takes its runs.

    Attributes:
      steps: of a run, those before it was resumed included.
      checkpoint_every: steps between two checkpoints, with one at the end; 0 saves nothing but at a deadline.
      deadline: of `time.monotonic`: no step begins after it.
    """

    steps: int
    checkpoint_every: int = 500
    deadline: float = math.inf


def train(config: Config, precision: str, seed: int, corpus: Corpus, folder: pathlib.Path, limits: Limits, *,
          layout: Layout = ONE_DEVICE, resume: bool = False) -> TrainState | None:
    """One run: new, or from its last checkpoint, which may have been written on another mesh.

    The configuration has to fit the mesh: `mesh.check`.

    Returns:
      The state after the last step, or None where the run had all of its steps already.

    Raises:
      ValueError: the folder has a run that is not to be resumed, or is another one.
      FloatingPointError: the loss is not finite.
    """
    identity = {"precision": precision, "seed": seed, "config": dataclasses.asdict(config),
                "text": corpus.digest()}
    recorded = _recorded_steps(folder)
    if recorded is not None and not resume:
        raise ValueError(f"{folder}: expected no run there, got one; resume it, or take another folder")
    if recorded is not None:
        log.check_identity(folder, identity)
        if recorded >= limits.steps:
            return None
    elif _writes_log():
        log.begin(folder, identity, _environment(layout))

    with Checkpoints(folder / "checkpoints") as checkpoints:
        state, position = init(config, seed, layout), 0
        if recorded is not None and (restored := checkpoints.restore(state)):
            state, position = restored
        if _writes_log():
            log.cut(folder, int(state.step))
        with log.open_steps(folder) if _writes_log() else open(os.devnull, "w") as file:
            loop = _Loop(config, precision, seed, corpus, limits, layout, checkpoints, file)
            return loop.run(state, position)


class _Loop:
    """The steps of a run, and what is done between them."""

    def __init__(self, config, precision, seed, corpus, limits, layout, checkpoints, file):
        self.config, self.limits, self.checkpoints, self.file = config, limits, checkpoints, file
        self.layout = layout
        self.step = train_step(config, precision, layout)
        self.validation_loss = validation_loss(config, precision, layout)
        self.sampler = Sampler(corpus.train, config.sequence, seed)
        self.validation = Sampler(corpus.validation, config.sequence, seed=0)
        self.title = f"{precision} seed {seed}"

    def run(self, state, position):
        first, last = int(state.step) + 1, self.limits.steps
        with tqdm(total=last, initial=first - 1, desc=self.title, unit="step",
                  disable=not _writes_log()) as self.progress:
            self.under_way, self.clock = None, time.perf_counter()
            for number in range(first, last + 1):
                sequences = self.sampler.batch(position, self.config.batch)
                state, metrics = self.step(state, self.layout.place(sequences))
                position += self.config.batch
                # Read a step's metrics when the next one is under way, so that the device never waits.
                self.finish_step()
                self.under_way = number, metrics
                is_late = time.monotonic() > self.limits.deadline
                validates, saves = self.is_due(number, is_late)
                if validates or saves:
                    self.finish_step(state if validates else None)
                    if saves:
                        self.checkpoints.save(state, position)
                    self.clock = time.perf_counter()
                if is_late:
                    break
        return state

    def is_due(self, number, is_late):
        """Whether a validation, and a checkpoint, follow the step."""
        is_last, every = number == self.limits.steps, self.limits.checkpoint_every
        validates = is_last or number % self.config.validation_every == 0
        return validates, is_late or (every > 0 and (is_last or number % every == 0))

    def finish_step(self, validated=None):
        """Waits for the step that is under way, and records it; with a state, its validation too."""
        if self.under_way is None:
            return
        (number, metrics), self.under_way = self.under_way, None
        metrics = jax.device_get(metrics)
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        loss, rate = float(metrics["loss"]), self.config.tokens_per_step / seconds
        log.append(self.file, {
            "step": number, "loss": loss, "gradient_norm": float(metrics["gradient_norm"]),
            "load": metrics["load"].tolist(), "dropped": metrics["dropped"].tolist(), "seconds": seconds,
            "tokens_per_s": rate, **(self.validate(validated) if validated else {})})
        self.progress.set_postfix(loss=f"{loss:.4f}", tokens_per_s=f"{rate:,.0f}", refresh=False)
        self.progress.update()
        if not math.isfinite(loss):
            raise FloatingPointError(f"{self.title}: step {number}: expected a finite loss, got {loss}")

    def validate(self, state):
        size = self.config.batch
        batches = (self.validation.batch(idx * size, size) for idx in range(self.config.validation_batches))
        losses = [self.validation_loss(state, self.layout.place(batch)) for batch in batches]
        return {"validation_loss": statistics.fmean(map(float, losses)), "digest": int(digest(state))}


def _environment(layout):
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    mesh = {} if layout.mesh is None else dict(layout.mesh.shape)
    return {"device": jax.devices()[0].device_kind, "mesh": mesh, "processes": jax.process_count(),
            "versions": versions}


def _recorded_steps(folder):
    """Of the run in the folder, or None: what the first process sees, in all of them."""
    steps = log.last_step(folder) if log.exists(folder) else -1
    if jax.process_count() > 1:
        steps = int(multihost_utils.broadcast_one_to_all(np.int32(steps)))
    return None if steps < 0 else steps


def _writes_log():
    return jax.process_index() == 0


def summary(folder: pathlib.Path) -> str:
    """A line about a run: its last loss and its speed, without the steps of compilation."""
    steps = log.read(folder).steps
    text = f"{folder.name}: {len(steps)} steps, loss {steps[-1]['loss']:.4f}"
    if timed := [step["seconds"] for step in steps[UNTIMED_STEPS:]]:
        seconds = statistics.median(timed)
        text += f", the first took {steps[0]['seconds']:.1f} s, the median {seconds * 1e3:.1f} ms"
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * args.minutes
    try:
        config, corpus = configs.load(args.config, dict(args.set)), read_corpus(args.text)
        _check_distributed(args)
        _start(args, _shared_facts(args, config, corpus))
        layout = layout_of(args.mesh)
        if layout.mesh is not None:
            check(config, layout.mesh)
        _check_folder_is_shared(args.out)
    except ValueError as error:
        parser.error(str(error))
    limits = Limits(args.steps or config.steps, args.checkpoint_every, deadline)
    if _writes_log():
        print(f"{len(corpus.train):,} bytes to train on, {len(corpus.validation):,} for validation, "
              f"{jax.devices()[0].device_kind}")
    # Seeds outside: what is done when the time is up has both precisions of a seed.
    for seed, precision in itertools.product(args.seed, args.precision):
        folder = args.out / f"{precision}-{seed}"
        if time.monotonic() < limits.deadline:
            train(config, precision, seed, corpus, folder, limits, layout=layout, resume=args.resume)
            if _writes_log():
                print(summary(folder), flush=True)
    return 0


def _parser():
    parser = argparse.ArgumentParser(prog="python -m examples.deepseek.train",
                                     description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="tiny", help=f"{', '.join(configs.PRESETS)}, or a JSON file")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", type=named_value,
                        help="fields of the configuration to replace, such as batch=8 attention=cudnn")
    parser.add_argument("--precision", nargs="+", default=["bf16"], choices=(*PRECISIONS, REFERENCE))
    parser.add_argument("--seed", nargs="+", default=[0], type=int, help="of the parameters and of the data")
    parser.add_argument("--steps", type=positive, help="steps of a run; the configuration's by default, "
                        "whose learning rate schedule does not change with this")
    parser.add_argument("--out", type=pathlib.Path, default="runs", metavar="DIR")
    parser.add_argument("--text", type=pathlib.Path, metavar="DIR",
                        help="Python files to train on; the standard library by default")
    parser.add_argument("--resume", action="store_true", help="go on where runs were interrupted")
    parser.add_argument("--checkpoint-every", type=int, default=500, metavar="STEPS",
                        help="0 saves nothing but at the end of --minutes")
    parser.add_argument("--minutes", type=float, default=math.inf,
                        help="stop after this time, with a checkpoint to resume from")
    add_mesh(parser)
    parser.add_argument("--distributed", action="store_true",
                        help="one of several processes, which share --out and are started together")
    return parser


def _check_distributed(args):
    if args.distributed and math.isfinite(args.minutes):
        raise ValueError("--minutes: expected one process, whose clock it is; give several --steps")
    if args.distributed and not args.mesh:
        raise ValueError("--mesh: expected, with --distributed, sizes that take all devices of all "
                         "processes, got none")


def _shared_facts(args, config, corpus):
    """What all processes of a run have to agree on; the folders may have other names on other hosts."""
    arguments = {name: value for name, value in vars(args).items() if name not in ("out", "text")}
    return {**arguments, "config": config, "text": corpus.digest()}


def _start(args, facts):
    """Whatever has to come before the first device is asked for, and what makes runs repeat their bits."""
    # Atomic additions come in any order: of them, XLA takes none.
    flag = "--xla_gpu_exclude_nondeterministic_ops=true"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    # Or a step on a mesh would be compiled again wherever it is resumed.
    jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
    if args.distributed:
        jax.distributed.initialize()
        check_hosts(facts)
    # XLA picks its GEMMs by timing them. A run that resumes finds the program that it began with.
    if jax.default_backend() == "gpu" and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(args.out.absolute() / "compiled"))


def _check_folder_is_shared(folder):
    """Or processes would wait for each other at the first checkpoint, and never go on."""
    if jax.process_count() == 1:
        return
    mark = folder / f".seen-{multihost_utils.broadcast_one_to_all(np.int32(time.time_ns() % 2**31))}"
    if _writes_log():
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    multihost_utils.sync_global_devices("mark")
    is_seen = multihost_utils.process_allgather(np.array(mark.exists()))
    if _writes_log():
        mark.unlink()
    if not is_seen.all():
        raise ValueError(f"--out: expected a folder that all processes share, got {folder}, in which "
                         f"processes {np.flatnonzero(~is_seen).tolist()} do not see what the first writes")


if __name__ == "__main__":
    raise SystemExit(main())
