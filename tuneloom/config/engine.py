"""Bases, their replicas and their engines."""

from typing import Literal, Self

from pydantic import Field, model_validator

from tuneloom.config.section import Section


class EngineSettings(Section):
    """One base's engine. Lengths are in tokens."""

    dtype: Literal["auto", "bf16", "fp32"] = Field("auto", description="number format of weights and computing")
    quantization: Literal["none", "nf4", "int8"] = Field(
        "none", description="keep the linear layers of a plain base in 4 or 8 bits, by bitsandbytes"
    )
    memory_share: float = Field(0.9, gt=0, le=1, description="share of the free memory that a base may plan with")
    max_sequences: int = Field(32, ge=1, description="sequences that run at once")
    max_waiting: int = Field(256, ge=1, description="requests that may wait; beyond it a request gets 503")
    max_length: int | None = Field(None, ge=16, description="context served; None: the base's own")
    kv_cache_tokens: int | None = Field(
        None, ge=64, description="tokens of all running sequences together; None: what `max_sequences` can use"
    )
    kv_cache: Literal["auto", "dense", "paged"] = Field(
        "auto", description="form of the cache of keys and values; auto: dense on a CPU, paged elsewhere"
    )
    prefix_cache_bytes: int = Field(
        512 << 20,
        ge=0,
        description="prefixes of prompts kept beside a dense cache; a paged one keeps them in itself; 0: none",
    )
    max_step_tokens: int = Field(256, ge=16, description="tokens of one step, decode rows and prefill together")
    max_step_ms: float = Field(
        200.0, gt=0, description="time of a step while sequences decode; prompts are read in chunks that fit it"
    )
    decode_weight: float = Field(
        2.0, gt=0, description="what an answer's token counts against a prompt's where owners share a base"
    )
    adapter_bytes_per_token: int = Field(
        1 << 20, ge=1, description="bytes of a loaded adapter that count as one prompt token of its owner"
    )
    adapter_slots: int = Field(16, ge=1, description="adapters on the device at once")
    max_rank: int = Field(64, ge=1, description="largest adapter rank accepted")
    host_cache_bytes: int = Field(1 << 30, ge=0, description="adapters kept in host memory, ready to copy")
    disk_cache_bytes: int = Field(16 << 30, ge=0, description="adapters kept on local disk")
    adapter_timeout_s: float = Field(
        60.0, gt=0, description="seconds a request waits for its adapter; then it gets 503"
    )
    adapter_loaders: int = Field(4, ge=1, description="adapters that are read at once")
    adapter_failure_s: float = Field(5.0, ge=0, description="seconds that a missing or broken adapter is remembered")
    adapter_idle_s: float | None = Field(
        None, gt=0, description="seconds unused after which an adapter leaves the device and host memory; None: never"
    )
    threads: int = Field(
        0, ge=0, description="threads that compute on a CPU; 0: the cores of the machine less one, at least one"
    )
    native: bool = Field(True, description="use the CPU's matrix units by packed weights and our own kernels")


class BaseSettings(Section):
    """A base that is served and trained on.

    The number of its replicas, processes that each hold all of it, is fixed (`replicas`), or follows the load between
    `min_replicas` and `max_replicas`.
    """

    id: str = Field(min_length=1, description="its id in the catalogue")
    replicas: int = Field(1, ge=1, description="replicas while neither limit below says otherwise")
    min_replicas: int | None = Field(
        None, ge=0, description="fewest replicas; 0: none while nobody asks; None: `replicas`"
    )
    max_replicas: int | None = Field(None, ge=1, description="most replicas; None: `replicas`")
    target_waiting_tokens: int = Field(
        4096, ge=1, description="tokens that may wait to be computed in each replica before there is one more"
    )
    scale_window_s: float = Field(10.0, gt=0, description="time over which the load is averaged")
    scale_up_delay_s: float = Field(5.0, ge=0, description="time that it takes too long before replicas are added")
    scale_down_delay_s: float = Field(300.0, ge=0, description="time that fewer replicas would do before one ends")
    scale_to_zero_delay_s: float = Field(900.0, ge=0, description="time without a request before the last one ends")
    warmup_s: float = Field(
        10.0, ge=0, description="most time a new replica spends on loading the adapters that it will get; 0: none"
    )
    load_factor: float = Field(
        1.25, ge=1, description="an adapter's replica is passed over when its queue is this many times the mean..."
    )
    load_slack: int = Field(2, ge=1, description="...and this many requests more")
    spread_rate: float = Field(
        4.0,
        gt=0,
        description="requests per second of one adapter, at one gateway, up to which it stays on one replica; above it "
        "on two, then four...",
    )
    num_cpus: float = Field(0.1, ge=0, description="CPUs of the Ray cluster that a replica reserves")
    num_gpus: float = Field(0, ge=0, description="GPUs that a replica reserves and gets")
    engine: EngineSettings = Field(EngineSettings(), description="how its engine runs")

    @property
    def most_replicas(self) -> int:
        return self.max_replicas or max(self.replicas, self.min_replicas or 0)

    @property
    def fewest_replicas(self) -> int:
        return min(self.replicas, self.most_replicas) if self.min_replicas is None else self.min_replicas

    @model_validator(mode="after")
    def _limits_fit(self) -> Self:
        if self.fewest_replicas > self.most_replicas:
            raise ValueError(f"`min_replicas` {self.min_replicas} is above `max_replicas` {self.max_replicas}")
        return self
