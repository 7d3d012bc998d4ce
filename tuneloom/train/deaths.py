"""How the processes before this one ended, told by a file that each leaves behind unless it ends in order.

A process that the kernel or Ray ends for want of memory says nothing. The next one sees that it died, and whether
memory was short then.
"""

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tuneloom.train import meter

FILE = "process.json"


@dataclass(frozen=True)
class Process:
    """A process that trains. `deaths` in a row of the same attempt came before it, with no state saved between.

    `micro_size` is what the run was cut down to so that it fits into memory; None: nothing was cut.
    """

    attempt: int
    deaths: int = 0
    was_short: bool = False
    oom_kills: int = 0
    micro_size: int | None = None


class Deaths:
    """What is known of the deaths before this process, in the job's folder on this machine.

    `too_large` says why the run seems too large for the memory; None if nothing says so.
    """

    def __init__(self, folder: Path, attempt: int) -> None:
        self._path = folder / FILE
        before = self._read()
        self._now = Process(attempt, oom_kills=meter.oom_kills())
        self.too_large: str | None = None
        if before is not None:
            deaths = before.deaths + 1 if before.attempt == attempt else 0
            self._now = replace(self._now, deaths=deaths, micro_size=before.micro_size)
            self.too_large = _why(before, self._now)
        self._write()

    @property
    def micro_size(self) -> int | None:
        """Rows of a forward pass that an earlier process was cut down to."""
        return self._now.micro_size

    def cut(self, micro_size: int) -> None:
        """Remember a smaller micro-batch for the processes to come, and count deaths anew."""
        self._now = replace(self._now, micro_size=micro_size, deaths=0)
        self._write()

    def look(self) -> None:
        """Note it if memory is short; called again and again."""
        if not self._now.was_short and meter.is_memory_short():
            self._now = replace(self._now, was_short=True)
            self._write()

    def saved(self) -> None:
        """A state was saved: deaths before it say nothing any more."""
        if self._now.deaths or self._now.was_short:
            self._now = replace(self._now, deaths=0, was_short=False)
            self._write()

    def end(self) -> None:
        """This process ends in order."""
        self._path.unlink(missing_ok=True)

    def _read(self) -> Process | None:
        try:
            return Process(**json.loads(self._path.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_suffix(".draft")
        draft.write_text(json.dumps(asdict(self._now)))
        os.replace(draft, self._path)


def _why(before: Process, now: Process) -> str | None:
    """Why this run seems too large for the memory; None if nothing says so."""
    if before.was_short or now.oom_kills > before.oom_kills:
        return "the training process was ended while memory was short"
    if now.deaths >= 2:
        return f"the training process died {now.deaths} times in a row and gave no reason"
    return None
