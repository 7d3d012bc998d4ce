"""Small values that records and requests share: scopes, adapters and where a call goes."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

LOCAL_OWNER = "local"

# The context of a base whose config names none: a recurrent one has no longest position.
DEFAULT_CONTEXT_LENGTH = 2048

# `inference` calls models; `training` makes and changes files, jobs and models; `account` looks after its owner's keys,
# webhooks and usage; `admin` is for who runs the installation.
Scope = Literal["inference", "training", "account", "admin"]
ALL_SCOPES: tuple[Scope, ...] = ("inference", "training", "account", "admin")


class AdapterRef(BaseModel):
    """An immutable adapter by content.

    `sha256` hashes its files (see `adapter_sha256`); `uri` is the blob prefix that holds them; `rank` is the largest
    rank of any module; `size_bytes` is the size of the weights file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    sha256: str
    uri: str
    rank: int
    size_bytes: int


class Target(BaseModel):
    """Where a call goes: a base, and one immutable adapter or none. `name` is what the caller asked for."""

    model_config = ConfigDict(frozen=True)
    name: str
    base: str
    adapter: AdapterRef | None = None
    version: str | None = None

    @property
    def stable_name(self) -> str:
        """The name that use is counted under, which never changes its meaning: a base's id, `name@vN`, or that of a
        checkpoint.
        """
        if self.version is None:
            return self.base
        # `version` is `{owner}:{name}:v{number}` or a checkpoint's name, whose last part begins otherwise.
        *_, name, number = self.version.split(":")
        return f"{name}@{number}" if number.startswith("v") else self.version
