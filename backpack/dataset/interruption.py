"""What a run over a data set has computed so far, saved to be continued after it was killed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from backpack.dataset.checkpoint import Checkpoint
from backpack.dataset.collection import Collection
from backpack.dataset.processes import Processes
from backpack.dataset.randomness import Randomness
from backpack.dataset.stores import FileRows, Rows


@dataclass(eq=False)
class Counts:
    """Of the batches of this process: their loss, what it divides by, and how many samples and batches there were."""

    loss: Tensor
    divided: float = 0.0
    seen: int = 0
    done: int = 0


@dataclass(eq=False)
class Interruption:
    """Saves a run, and goes on from what was saved.

    ``in_step``: the processes that must go on at the same batch; ``None``: each goes on by itself.
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
            self._restore(*found)

    def _found(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was saved last, by all processes in step.

        A process replaces its file when all have written theirs: if one was killed in between, it still has the new
        one beside the old one.
        """
        current = self.checkpoint.load()
        if self.in_step is None:
            return current
        written = [current, self.checkpoint.load_written()]
        own: dict[int, Any] = {found[1]["done"]: found for found in written if found is not None}
        last = None if current is None else current[1]["done"]
        everything = self.in_step.all_objects((last, set(own)))
        common = {done for done, _ in everything if done is not None}.intersection(*(n for _, n in everything))
        if common and max(common) != last:
            self.checkpoint.replace()
        return own[max(common)] if common else None

    def save_if_due(self) -> None:
        """Save at intervals."""
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
        now, text = self.random.read()
        collection, counts = self.collection, self.counts
        tensors = {"loss": counts.loss}
        tensors |= {f"began {name}": value for name, value in self.began[0].items()}
        tensors |= {f"now {name}": value for name, value in now.items()}
        rows = []
        for (name, savefield), state in collection.sums.items():
            tensors |= {f"sums {name} {savefield} {k}": part for k, part in enumerate(state)}
        for (name, savefield), store in collection.rows.items():
            if isinstance(store, FileRows):
                store.flush()
            else:
                tensors[f"rows {name} {savefield}"], tensors[f"places {name} {savefield}"] = store.pack()
                rows.append((name, savefield))
        header = {
            "done": counts.done,
            "seen": counts.seen,
            "divided": counts.divided,
            "selected": collection.selected,
            "began": self.began[1],
            "now": text,
            "sums": [(*key, len(state)) for key, state in collection.sums.items()],
            "rows": rows,
        }
        self.checkpoint.write(tensors, header)
        if self.in_step is not None:
            self.in_step.all_objects(None)
        self.checkpoint.replace()

    def _restore(self, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        collection, counts = self.collection, self.counts
        counts.done, counts.seen, counts.divided = header["done"], header["seen"], header["divided"]
        counts.loss = tensors["loss"].to(counts.loss.device)
        collection.selected = header["selected"]
        self.began = _named(tensors, "began "), header["began"]
        self.now = _named(tensors, "now "), header["now"]
        devices = {name: collection.device or p.device for name, p in collection.parameters.items()}
        for name, savefield, count in header["sums"]:
            state = [tensors[f"sums {name} {savefield} {k}"].to(devices[name]) for k in range(count)]
            collection.sums[name, savefield] = state
        for name, savefield in header["rows"]:
            chunk, places = tensors[f"rows {name} {savefield}"].to(devices[name]), tensors[f"places {name} {savefield}"]
            collection.rows[name, savefield] = Rows([chunk], [places], [1.0])


def _named(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
