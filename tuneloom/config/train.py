"""Jobs: how they run, and what watches them."""

from typing import Literal

from pydantic import Field

from tuneloom.config.section import Section


class TrainSettings(Section):
    max_running: int | None = Field(
        None, ge=1, description="jobs that train at once; None: as many as free cores, GPUs and memory hold"
    )
    max_running_per_owner: int = Field(1, ge=1, description="of which one owner may have so many")
    max_queued_per_owner: int = Field(
        100, ge=1, description="jobs of one owner that may wait to run; beyond it a create gets 429"
    )
    max_losses: int = Field(3, ge=0, description="times an attempt may be lost before the job fails")
    num_cpus: float = Field(1, ge=0, description="CPUs of the Ray cluster that a worker reserves")
    num_gpus: float = Field(
        0, ge=0, le=1, description="of a worker: a GPU, or the part of one that Ray reserves; 0: CPUs"
    )
    workers: int = Field(
        1,
        ge=1,
        description="processes that share the steps of a job, each with its own `num_cpus`, `num_gpus`, `threads`",
    )
    threads: int = Field(0, ge=0, description="threads that a worker computes with; 0: all cores")
    niceness: int = Field(10, ge=0, le=19, description="how far training steps back behind serving on the same cores")
    scheduling: Literal["nice", "batch", "idle"] = Field(
        "nice", description="Linux's class for training: by `niceness` alone, for work in bulk, or only with idle cores"
    )
    checkpoint_interval_s: float = Field(
        120.0, gt=0, description="time between checkpoints where a job does not say another"
    )
    checkpoints_kept: int = Field(3, ge=1, description="the last so many of a running job; they can be called")
    upload_states: Literal["auto"] | bool = Field(
        "auto", description="store what a run goes on from beside its blobs; auto: where blobs are not local files"
    )
    start_timeout_s: float = Field(300.0, gt=0, description="from launch to the first heartbeat")
    heartbeat_timeout_s: float = Field(120.0, gt=0, description="silence after which an attempt counts as lost")
    min_rows: int = Field(10, ge=1, description="fewest rows of a training file")
    memory_bytes: int | None = Field(
        None,
        ge=1 << 20,
        description="memory that one job may take, of a GPU or else of the host; None: all of the host's, and with "
        "GPUs what the trainer finds",
    )
    price_per_hour: float | None = Field(None, gt=0, description="what an hour of a job's device costs; None: no costs")
    currency: str = Field("USD", pattern="^[A-Z]{3}$", description="of `price_per_hour`")

    def cores_of(self, cores: int) -> int:
        """The cores that a job computes on, of a machine that has so many."""
        return min(self.threads or cores, cores)

    def places_on(self, cores: int) -> int:
        """Jobs that such a machine runs side by side without GPUs, where nothing else limits them."""
        return self.max_running or max(1, cores // (self.cores_of(cores) * self.workers))


class ControlSettings(Section):
    tick_s: float = Field(0.5, gt=0, description="how often jobs, drafts and checks of files are looked at")
    check_timeout_s: float = Field(900.0, gt=0, description="time for checking a job's files")
