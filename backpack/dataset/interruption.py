"""What a run over a data set has computed so far, saved so that it can go on after it was killed."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from backpack.dataset.checkpoint import Checkpoint, State
from backpack.dataset.collection import Collection
from backpack.dataset.processes import Processes
from backpack.dataset.randomness import Randomness
from backpack.dataset.sample_rows import FileRows, Rows


@dataclass(eq=False)
class Counts:
    """Sums over the batches of this process.

    ``loss``: the losses, weighed; ``divided``: what the losses divide by; ``seen``: samples; ``done``: batches.
    """

    loss: Tensor
    divided: float = 0.0
    seen: int = 0
    done: int = 0


@dataclass(eq=False)
class Interruption:
    """Saves the state of a run, and restores what an earlier run with the same identity has saved.

    ``in_step``: the processes that must go on at the same batch; ``None`` if each goes on by itself. ``goes_on``:
    whether a state was restored. ``began`` and ``now``: the states of generators before the first batch, and now.
    """

    checkpoint: Checkpoint
    random: Randomness
    collection: Collection
    counts: Counts
    in_step: Processes | None
    goes_on: bool = field(init=False)

    def __post_init__(self) -> None:
        self.began = self.now = self.random.read()
        found = self._found()
        self.goes_on = found is not None
        if found is None:
            self.save()  # what cannot be written is an error now
        else:
            self._restore(found)

    def _found(self) -> State | None:
        """The state that was saved last, by all processes in step.

        A process replaces its file when all have written theirs. If one was killed in between, it still has the new
        file beside the old one.
        """
        current = self.checkpoint.load()
        if self.in_step is None:
            return current
        written = [current, self.checkpoint.load_written()]
        own = {state["counts"]["done"]: state for state in written if state is not None}
        last = None if current is None else current["counts"]["done"]
        everything = self.in_step.all_objects((last, set(own)))
        common = {done for done, _ in everything if done is not None}.intersection(*(n for _, n in everything))
        if common and max(common) != last:
            self.checkpoint.replace()
        return own[max(common)] if common else None

    def save_if_due(self) -> None:
        """Save if enough time has passed, for one of the processes in step at least."""
        due = self.checkpoint.due
        if self.in_step is not None:
            due = any(self.in_step.all_objects(due))
        if due:
            self.save()

    def save(self) -> None:
        """Save all that the run holds.

        Raises:
            OSError: It cannot be written; what was saved before is still there.
        """
        rows = []
        for key, store in self.collection.rows.items():
            if isinstance(store, FileRows):
                store.flush()
            else:
                rows.append((key, store.pack()))
        state = {
            "counts": vars(self.counts),
            "began": self.began,
            "now": self.random.read(),
            "sums": list(self.collection.sums.items()),
            "rows": rows,
        }
        self.checkpoint.write(state)
        if self.in_step is not None:
            self.in_step.all_objects(None)
        self.checkpoint.replace()

    def _restore(self, state: State) -> None:
        collection, counts = self.collection, self.counts
        loss = state["counts"].pop("loss").to(counts.loss.device)
        vars(counts).update(state["counts"], loss=loss)
        self.began, self.now = state["began"], state["now"]
        devices = {name: collection.device or p.device for name, p in collection.parameters.items()}
        for (name, savefield), tensors in state["sums"]:
            collection.sums[name, savefield] = [tensor.to(devices[name]) for tensor in tensors]
        for (name, savefield), (rows, places) in state["rows"]:
            collection.rows[name, savefield] = Rows([rows.to(devices[name])], [places], [1.0])
