"""The adapter with the least validation loss of a run that may stop early, beside its states and inside each."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

# Its folder inside a saved state, so that a state has all that a run needs to go on.
STATE_BEST = "best"


class BestAdapter:
    """One adapter folder that is replaced as a whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, write: Callable[[Path], None]) -> None:
        """Let `write` fill a folder and take it in the place of the one before."""
        draft = self.folder.with_name(f".{self.folder.name}-draft")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        write(draft)
        shutil.rmtree(self.folder, ignore_errors=True)
        os.rename(draft, self.folder)

    def copy_into(self, state: Path) -> None:
        """Put it into a state that is being saved, if there is one."""
        if self.folder.exists():
            shutil.copytree(self.folder, state / STATE_BEST, copy_function=os.link)

    def restore(self, state: Path | None) -> None:
        """Be what a state had, or nothing."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if state is not None and (state / STATE_BEST).exists():
            self.keep(lambda folder: shutil.copytree(state / STATE_BEST, folder, dirs_exist_ok=True) and None)
