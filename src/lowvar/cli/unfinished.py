"""An estimate that is not finished: its folder RUN.partial, checkpoints in it, and the records of its way."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvar.errors import UserError

if TYPE_CHECKING:
    from lowvar.expect import Progress

__all__ = ["Kept"]

_EVERY = 5.0  # seconds between checkpoints


class Kept:
    """The unfinished run in RUN.partial.

    Args:
        partial: its folder.
        identity: the settings that belong to it.

    Attributes:
        records: how value and interval went, by evaluations spent; at most one a twentieth of them.
    """

    def __init__(self, partial: Path, identity: dict[str, Any]) -> None:
        self.partial, self.identity = partial, identity
        self.records: list[dict[str, Any]] = []
        self._last: Progress | None = None
        self._saved = time.perf_counter()

    def begin(self, *, resume: bool) -> Any:
        """The state to go on from, or None.

        Raises:
            UserError: if the checkpoint is of other settings.
        """
        import yaml

        from lowvar.cli.results import plain
        from lowvar.expect import RunState
        from lowvar.train import checkpoints

        found = checkpoints.latest(self.partial / "checkpoints") if resume else None
        if found is None:
            self.partial.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(plain(self.identity), sort_keys=False)
            (self.partial / "config.yaml").write_text(text, encoding="utf-8")
            return None
        before, now = found.state["identity"], plain(self.identity)
        other = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
        if other:
            k = other[0]
            raise UserError(
                f"the run in {self.partial} has {k} {before.get(k)!r}, now it is {now.get(k)!r}; resume with the same "
                "arguments, or start anew with --overwrite"
            )
        self.records = list(found.state["records"])
        return RunState(found.tensors.get("sums", {}), found.state["plain"])

    def record(self, progress: Progress) -> None:
        """Takes note of a record; saves now and then."""
        self._last = progress
        found = progress.estimate
        if found is not None and (progress.done or not self.records or progress.nfe > 1.05 * self.records[-1]["nfe"]):
            line: dict[str, Any] = {"nfe": progress.nfe, "samples": found.samples, "design": found.design}
            line["half_width"] = found.half_width
            if found.value.ndim == 0:
                line |= {k: float(getattr(found, k)) for k in ("value", "low", "high")}
            self.records.append(line)
        if not progress.done and time.perf_counter() - self._saved > _EVERY:
            self.save()

    def save(self) -> bool:
        """Writes a checkpoint of the last record; where there is none and was none, the folder goes instead.

        Returns:
            Whether there is a checkpoint.
        """
        from lowvar.cli.results import plain
        from lowvar.train import checkpoints

        if self._last is None:
            if checkpoints.latest(self.partial / "checkpoints") is not None:
                return True
            shutil.rmtree(self.partial, ignore_errors=True)
            return False
        state = {
            "update": self._last.nfe,
            "identity": plain(self.identity),
            "plain": self._last.state.plain,
            "records": self.records,
        }
        checkpoints.save(self.partial / "checkpoints", state, {"sums": self._last.state.tensors})
        checkpoints.prune(self.partial / "checkpoints", 1)
        self._saved = time.perf_counter()
        return True
