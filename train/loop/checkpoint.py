"""Checkpoints of a run by Orbax: trained weights, optimizer, step and position in the data."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from seer_jax.train.data.batches import DataPosition
from seer_jax.train.step import Weights


@dataclasses.dataclass(frozen=True)
class RunState:
    """State from which a run resumes.

    Attributes:
      step: number of optimizer steps done.
      trained: the trained weights.
      optimizer: state of the optimizer.
      position: in the data, after the last batch.
      tokens: number of tokens trained on so far.
    """

    step: int
    trained: Weights
    optimizer: Any
    position: DataPosition
    tokens: int


class Checkpoints:
    """The checkpoints in one folder. An incomplete one, of a run that was killed while writing, is ignored and removed."""

    def __init__(self, folder: Path, *, keep: int, settings: dict[str, Any]):
        """
        Args:
          folder: created if it does not exist.
          keep: number of checkpoints to keep; older ones are deleted.
          settings: of the run, JSON; checkpoints of a run with other settings are refused.
        """
        import orbax.checkpoint as ocp  # takes seconds to import

        self.folder, self.settings = folder.absolute(), settings  # Orbax accepts absolute paths only
        # Written synchronously: gates are small, and each checkpoint is complete before the next step.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=False
        )
        self._manager = ocp.CheckpointManager(self.folder, item_names=("trained", "optimizer", "run"), options=options)
        self._args = ocp.args

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint."""
        return self._manager.latest_step()

    def save(self, state: RunState) -> None:
        """Writes a checkpoint, unless there is one of this step."""
        if self.latest == state.step:
            return
        run = {"position": dataclasses.asdict(state.position), "tokens": state.tokens, "settings": self.settings}
        items = self._args.Composite(
            trained=self._args.StandardSave(state.trained),
            optimizer=self._args.StandardSave(state.optimizer),
            run=self._args.JsonSave(run),
        )
        self._manager.save(state.step, args=items, force=True)

    def restore(self, like: RunState) -> RunState:
        """The newest checkpoint, its arrays sharded as those of `like`; `like` itself where there is none.

        Raises:
          ValueError: the checkpoint is of a run with other settings.
        """
        if self.latest is None:
            return like
        run = self._manager.restore(self.latest, args=self._args.Composite(run=self._args.JsonRestore()))["run"]
        self._check(run["settings"])
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (like.trained, like.optimizer)
        )
        items = self._manager.restore(
            self.latest,
            args=self._args.Composite(
                trained=self._args.StandardRestore(abstract[0]), optimizer=self._args.StandardRestore(abstract[1])
            ),
        )
        position = DataPosition(**run["position"])
        return RunState(self.latest, items["trained"], items["optimizer"], position, run["tokens"])

    def close(self) -> None:
        """Ends Orbax's threads."""
        self._manager.close()

    def _check(self, theirs: dict[str, Any]) -> None:
        if differing := _differences(self.settings, theirs):
            listed = "; ".join(f"{name} is {ours!r}, there {got!r}" for name, ours, got in differing)
            raise ValueError(
                f"The checkpoints in {self.folder} must be of a run with the same settings; differing: {listed}. "
                "Restore the settings, or give another output folder."
            )


def _differences(ours: Any, theirs: Any, place: str = "") -> list[tuple[str, Any, Any]]:
    """Leaves in which two JSON values differ, as (place, ours, theirs)."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        names = list(dict.fromkeys([*ours, *theirs]))
        found = [_differences(ours.get(n), theirs.get(n), f"{place}.{n}".lstrip(".")) for n in names]
        return [difference for part in found for difference in part]
    return [] if ours == theirs else [(place, ours, theirs)]
