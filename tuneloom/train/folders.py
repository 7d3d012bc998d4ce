"""Where a job has its files on the machine that trains it."""

from pathlib import Path

from tuneloom.config import Settings


def run_folder(settings: Settings, job_id: str) -> Path:
    """The job's tokens and states."""
    return settings.home / "runs" / job_id


def stop_file(settings: Settings, job_id: str, attempt: int) -> Path:
    """It appears when the driver of an attempt is told to end."""
    return run_folder(settings, job_id) / f"stop-a{attempt}"
