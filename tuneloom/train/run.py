"""What the parts of an attempt share: where it runs, with what, and how it may end. Does nothing by itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tuneloom.bases import Base
from tuneloom.config import Settings
from tuneloom.domain import Job
from tuneloom.store import Store
from tuneloom.train.checkpoints import Checkpoints
from tuneloom.train.deaths import Deaths
from tuneloom.train.progress import Pulse, Voice
from tuneloom.train.team import Team

Result = Literal["published", "paused", "cancelled", "failed", "stopped", "fenced"]


@dataclass(frozen=True)
class Run:
    """What the parts of one attempt work with. `folder` is the job's own on this machine."""

    settings: Settings
    store: Store
    voice: Voice
    pulse: Pulse
    job: Job
    base: Base
    folder: Path
    checkpoints: Checkpoints
    deaths: Deaths
    team: Team


def early_end(pulse: Pulse) -> Result | None:
    """What to end with if the job is not wanted to go on."""
    ends: dict[str, Result] = {"pause": "paused", "cancel": "cancelled", "stop": "stopped"}
    return ends.get(pulse.intent(fresh=True))
