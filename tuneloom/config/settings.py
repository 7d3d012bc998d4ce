"""The whole tree, and how it is read."""

import os
from pathlib import Path
from typing import Self

import yaml
from pydantic import Field, ValidationError, model_validator

from tuneloom.config.audit import AuditSettings
from tuneloom.config.drafting import DraftingSettings
from tuneloom.config.engine import BaseSettings
from tuneloom.config.gateway import GatewaySettings
from tuneloom.config.identity import IdentitySettings
from tuneloom.config.limits import LimitsSettings
from tuneloom.config.section import Section
from tuneloom.config.train import ControlSettings, TrainSettings
from tuneloom.config.usage import UsageSettings
from tuneloom.config.webhooks import WebhookSettings
from tuneloom.errors import InvalidRequest

DEFAULT_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
CONFIG_FILE = "config.yaml"


class Settings(Section):
    """The whole tree. Empty URLs stand for SQLite and files under `home`."""

    home: Path = Field(description="folder of the state; not in the file, see `load`")
    documents_url: str = Field("", description="where records are: `sqlite:PATH` or `firestore:PROJECT/DATABASE`")
    blobs_url: str = Field("", description="where bytes are: `file:FOLDER` or `gs://BUCKET/PREFIX`")
    bases: tuple[BaseSettings, ...] = Field(
        (BaseSettings(id=DEFAULT_BASE),), min_length=1, description="what is served and trained on"
    )
    base_aliases: dict[str, str] = Field(
        {
            "gpt-4o-mini-2024-07-18": DEFAULT_BASE,
            "gpt-4.1-nano-2025-04-14": DEFAULT_BASE,
            "gpt-3.5-turbo-0125": DEFAULT_BASE,
        },
        description="other names of bases, so that scripts written for OpenAI run unchanged",
    )
    gateway: GatewaySettings = GatewaySettings()
    train: TrainSettings = TrainSettings()
    control: ControlSettings = ControlSettings()
    audit: AuditSettings = AuditSettings()
    drafting: DraftingSettings = DraftingSettings()
    webhooks: WebhookSettings = WebhookSettings()
    identity: IdentitySettings = IdentitySettings()
    limits: LimitsSettings = LimitsSettings()
    usage: UsageSettings = UsageSettings()
    production: bool | None = Field(
        None, description="whether emulators are refused; None: if a cloud project does not begin with `demo-`"
    )
    pepper: Path | None = Field(
        None,
        description="file with what the secrets of keys are hashed with, the same on every machine of a cluster; "
        "None: one in `home`, made at first use",
    )
    signing_key: Path | None = Field(
        None,
        description="file with the Ed25519 key (PEM) that signs what is said of adapters, the same on every machine of "
        "a cluster; None: one in `home`, made at first use",
    )

    @model_validator(mode="after")
    def _limits_are_counted_once(self) -> Self:
        if not self.limits.counts_alike(self.gateway.replicas):
            raise ValueError(
                f"`limits`: {self.gateway.replicas} gateways (`gateway.replicas`) would each count alone. Set "
                "`limits.redis_url`, or run one gateway"
            )
        return self

    @model_validator(mode="after")
    def _prices_are_of_bases(self) -> Self:
        if unknown := self.usage.prices.keys() - {base.id for base in self.bases}:
            raise ValueError(f"`usage.prices`: `{min(unknown)}` is not the id of one of `bases`")
        return self

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
        reason = "there is no such setting" if first["type"] == "extra_forbidden" else first["msg"]
        raise InvalidRequest(f"{path}: `{where}`: {reason}.") from error
    except (yaml.YAMLError, TypeError) as error:
        raise InvalidRequest(f"{path} is not a YAML mapping: {error}") from error
