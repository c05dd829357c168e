"""Whether a policy's features are alive, from the spectrum lines of its run: what to say when that changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


class FeatureWatch:
    """Reads spectrum lines in their order and says once when features vanish, and once when they are back.

    They have vanished where ``feature_rank`` is 0 on the states of the rollout: there the output is hardly more than
    its biases, and hardly any gradient comes back. ``fresh``: each task has a new agent (protocol rl).
    """

    def __init__(self, fresh: bool) -> None:
        self._fresh, self._vanished, self._task_index = fresh, False, -1

    def notice(self, line: Mapping[str, Any]) -> str | None:
        """What this line has to tell; lines of the probe batch, and those without a rank, tell nothing."""
        rank = line.get("feature_rank")
        if rank is None or line["batch"] != "rollout":
            return None
        if self._fresh and line["task_index"] != self._task_index:
            self._vanished = False
        self._task_index = line["task_index"]
        if self._vanished == (rank == 0):
            return None
        self._vanished = not self._vanished
        what = "features have vanished" if self._vanished else "features are back"
        return f"{line['task']}: {what} since step {line['global_step']:,} (feature_rank {rank})"


def notices(lines: Iterable[Mapping[str, Any]], fresh: bool) -> list[str]:
    """All that a run's lines have to tell."""
    watch = FeatureWatch(fresh)
    return [text for line in lines if (text := watch.notice(line))]
