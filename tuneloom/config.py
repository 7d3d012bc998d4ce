"""The settings of an installation: one tree, read once at the start and handed on in pieces.

A file `config.yaml` in the home folder overrides the defaults, which run on one machine without a cloud. The
environment says only where home is (`TUNELOOM_HOME`) and is read by entry points, never by an import.
"""

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tuneloom.errors import InvalidRequest

DEFAULT_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
CONFIG_FILE = "config.yaml"
SIGNING_KEY_FILE = "signing-key.pem"


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EngineSettings(Section):
    """One base's engine. Lengths are in tokens.

    `threads` 0: the cores of the machine less one, at least one.
    """

    dtype: Literal["auto", "bf16", "fp32"] = "auto"
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
    threads: int = Field(0, ge=0)
    native: bool = Field(True, description="use the CPU's matrix units by packed weights and our own kernels")


class BaseSettings(Section):
    """A base that is served and trained on.

    The number of its replicas, processes that each hold all of it, is fixed (`replicas`), or follows the load between
    `min_replicas` and `max_replicas`.
    """

    id: str
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
    num_cpus: float = Field(0.1, ge=0)
    num_gpus: float = Field(0, ge=0)
    engine: EngineSettings = EngineSettings()

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


class GatewaySettings(Section):
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535, description="0: any free port")
    replicas: int = Field(1, ge=1)
    max_ongoing_requests: int = Field(500, ge=1)
    cors_origins: tuple[str, ...] = ("*",)
    max_body_bytes: int = Field(32 << 20, description="largest JSON body")
    max_file_bytes: int = Field(512 << 20, description="largest uploaded file")
    max_part_bytes: int = Field(64 << 20, description="largest part of an upload")
    max_upload_bytes: int = Field(8 << 30, description="largest file made of parts")
    key_cache_s: float = Field(2.0, ge=0, le=5, description="how long an answer about a key is remembered")
    request_timeout_s: float = Field(600.0, gt=0)


class TrainSettings(Section):
    launcher: Literal["ray-jobs"] = "ray-jobs"
    max_running: int | None = Field(
        None, ge=1, description="jobs that train at once; None: as many as free cores, GPUs and memory hold"
    )
    max_running_per_owner: int = Field(1, ge=1, description="of which one owner may have so many")
    max_queued_per_owner: int = Field(
        100, ge=1, description="jobs of one owner that may wait to run; beyond it a create gets 429"
    )
    max_losses: int = Field(3, ge=0, description="times an attempt may be lost before the job fails")
    num_cpus: float = Field(1, ge=0)
    num_gpus: float = Field(0, ge=0)
    threads: int = Field(0, ge=0, description="0: all cores")
    niceness: int = Field(10, ge=0, le=19, description="how far training steps back behind serving on the same cores")
    scheduling: Literal["nice", "batch", "idle"] = Field(
        "nice", description="Linux's class for training: by `niceness` alone, for work in bulk, or only with idle cores"
    )
    checkpoint_interval_s: float = Field(120.0, gt=0)
    checkpoints_kept: int = Field(3, ge=1)
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
        return self.max_running or max(1, cores // self.cores_of(cores))


class ControlSettings(Section):
    tick_s: float = Field(0.5, gt=0)
    check_timeout_s: float = Field(900.0, gt=0, description="time for checking a job's files")


class Settings(Section):
    """The whole tree. Empty URLs stand for SQLite and files under `home`."""

    home: Path
    documents_url: str = ""
    blobs_url: str = ""
    bases: tuple[BaseSettings, ...] = (BaseSettings(id=DEFAULT_BASE),)
    base_aliases: dict[str, str] = {
        "gpt-4o-mini-2024-07-18": DEFAULT_BASE,
        "gpt-4.1-nano-2025-04-14": DEFAULT_BASE,
        "gpt-3.5-turbo-0125": DEFAULT_BASE,
    }
    gateway: GatewaySettings = GatewaySettings()
    train: TrainSettings = TrainSettings()
    control: ControlSettings = ControlSettings()
    signing_key: Path | None = Field(
        None,
        description="file with the Ed25519 key (PEM) that signs what is said of adapters, the same on every machine of "
        "a cluster; None: one in `home`, made at first use",
    )

    @property
    def documents(self) -> str:
        return self.documents_url or f"sqlite:{self.home / 'tuneloom.db'}"

    @property
    def blobs(self) -> str:
        return self.blobs_url or f"file:{self.home / 'blobs'}"

    @property
    def uploads_states(self) -> bool:
        """Whether the states of runs outlive the disk of their machine."""
        asked = self.train.upload_states
        return not self.blobs.startswith("file:") if asked == "auto" else asked

    @property
    def bases_dir(self) -> Path:
        return self.home / "bases"


def load(home: Path | str | None = None) -> Settings:
    """Read the settings of `home` (default: `$TUNELOOM_HOME`, else `.tuneloom`).

    Raises:
        InvalidRequest: the file is not YAML or a field is wrong; the message names it.
    """
    folder = Path(home or os.environ.get("TUNELOOM_HOME") or ".tuneloom").absolute()
    path = folder / CONFIG_FILE
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
        return Settings.model_validate({**(data or {}), "home": folder})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(f"{path}: `{where}`: {first['msg']}") from error
    except (yaml.YAMLError, TypeError) as error:
        raise InvalidRequest(f"{path} is not a YAML mapping: {error}") from error


def read_pepper(settings: Settings) -> bytes:
    """The installation's key for hashing secrets, 32 bytes; made on first use, readable by its user only."""
    return _read_secret(settings.home / "pepper", lambda: secrets.token_bytes(32))


def read_signing_key(settings: Settings) -> bytes:
    """The installation's Ed25519 key for signing lineages, as PEM. See `Settings.signing_key`.

    Raises:
        InvalidRequest: the file that the settings name cannot be read.
    """
    if settings.signing_key is None:
        return _read_secret(settings.home / SIGNING_KEY_FILE, _make_signing_key)
    try:
        return settings.signing_key.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"`signing_key`: {settings.signing_key} cannot be read: {error.strerror}.") from error


def _make_signing_key() -> bytes:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _read_secret(path: Path, make: Callable[[], bytes]) -> bytes:
    """What is in a file that only its user may read; made on first use, by one of several processes."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(make())
            file.flush()
            os.fsync(file.fileno())
        # A link fails if another process was first, and never shows half a file.
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
        draft.unlink()
    return path.read_bytes()
