"""Checkpoints of a run: its state, and how far it is in the data."""

from __future__ import annotations

import pathlib

import jax
import orbax.checkpoint as ocp

from examples.deepseek.step import TrainState


class Checkpoints:
    """The newest checkpoint of a run, in a folder. A context manager."""

    def __init__(self, folder: pathlib.Path):
        # Nothing is written behind the step's back: the state's memory is donated to the next one.
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    def save(self, state: TrainState, position: int) -> None:
        """Writes the state after its last step, with the sequences that the run has had by then."""
        items = ocp.args.Composite(state=ocp.args.StandardSave(state),
                                   data=ocp.args.JsonSave({"position": position}))
        self._manager.save(int(state.step), args=items)

    def restore(self, template: TrainState) -> tuple[TrainState, int] | None:
        """State and position, to the bit what was saved, or None; `template` has the state's shapes."""
        step = self._manager.latest_step()
        if step is None:
            return None
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), template)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(shapes), data=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        return restored.state, restored.data["position"]
