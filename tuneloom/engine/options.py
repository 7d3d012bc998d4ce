"""How one engine runs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineConfig:
    """How one engine runs; lengths in tokens. `config.EngineSettings` documents the fields they share.

    `native`: use what this CPU has beyond torch's plain operators, as packed weights and our own kernels.
    """

    dtype: str = "auto"
    max_sequences: int = 32
    max_waiting: int = 256
    max_length: int | None = None
    kv_cache_tokens: int | None = None
    kv_cache: str = "auto"
    prefix_cache_bytes: int = 512 << 20
    max_step_tokens: int = 256
    max_step_ms: float = 200.0
    decode_weight: float = 2.0
    adapter_bytes_per_token: int = 1 << 20
    adapter_slots: int = 16
    max_rank: int = 64
    host_cache_bytes: int = 1 << 30
    threads: int = 0
    native: bool = True
    quantization: str = "none"
    memory_share: float = 0.9
    adapter_timeout_s: float = 60.0
    adapter_loaders: int = 4
    adapter_failure_s: float = 5.0
    adapter_idle_s: float | None = None
