"""How much may be asked of the service, by whom."""

import ipaddress
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field

from tuneloom.config.section import Section
from tuneloom.domain import LOCAL_OWNER, Allowance, OwnerLimits, Principal, Rates


def _check_redis(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise ValueError("use `redis://HOST:PORT/DB`, or `rediss://` with TLS")
    if parts.password:
        raise ValueError("no password in the URL: name a file with it in `redis_password_file`")
    return url


def _check_network(text: str) -> str:
    ipaddress.ip_network(text)
    return text


def _filled(default: Allowance) -> BeforeValidator:
    """What a file says beside the default; null takes a limit away."""
    return BeforeValidator(lambda given: {**default.model_dump(), **given} if isinstance(given, dict) else given)


RedisUrl = Annotated[str, AfterValidator(_check_redis)]
Network = Annotated[str, AfterValidator(_check_network)]
OWNER = Allowance(costly_per_minute=60, light_per_minute=3000)
ANONYMOUS = Allowance(
    rates=Rates(requests_per_minute=20, requests_per_day=500, tokens_per_minute=40_000),
    costly_per_minute=10,
    costly_per_day=50,
    light_per_minute=300,
    max_concurrent=4,
    max_queued_jobs=2,
    files_bytes=256 << 20,
)


class LimitsSettings(Section):
    """Defaults for everybody; an admin gives single owners others, and keys have rates of their own.

    The owner `local`, whose machine it is, has only those that an admin sets.
    """

    redis_url: RedisUrl | None = Field(
        None, description="where the gateway's replicas count together; None: each in its memory, so there may be one"
    )
    redis_password_file: Path | None = Field(None, description="file with Redis' password")
    redis_timeout_s: float = Field(
        0.1, gt=0, le=10, description="how long a request waits for Redis; then nobody does, until it answers again"
    )
    key: Rates = Field(Rates(), description="of each key that has none of its own")
    owner: Annotated[Allowance, _filled(OWNER)] = Field(OWNER, description="of each owner")
    anonymous: Annotated[Allowance, _filled(ANONYMOUS)] = Field(
        ANONYMOUS, description="of each person who signed in anonymously"
    )
    anonymous_address: Rates = Field(
        Rates(requests_per_minute=100, requests_per_day=5000, tokens_per_minute=200_000),
        description="of all anonymous people behind one address together; costly things count as its requests too",
    )
    refused_per_minute: int = Field(
        300, ge=1, description="wrong keys from one address; beyond it, keys that are not known to be good are refused"
    )
    trusted_proxies: tuple[Network, ...] = Field(
        (), description="networks whose `X-Forwarded-For` is believed, such as the load balancer's"
    )
    reserved_tokens: int = Field(
        1024, ge=1, description="most tokens of an answer that count before it is there; then its true length does"
    )

    def counts_alike(self, replicas: int) -> bool:
        """Whether so many gateways keep the limits that these settings set, and not each of them all by itself."""
        plain = LimitsSettings()
        names = ("key", "owner", "anonymous", "anonymous_address")
        is_plain = all(getattr(self, name) == getattr(plain, name) for name in names)
        return replicas == 1 or self.redis_url is not None or is_plain

    def allowance(self, principal: Principal, stored: OwnerLimits | None) -> Allowance:
        """What `principal` may use, all of it counted for their owner."""
        if principal.kind == "anonymous":
            default = self.anonymous
        else:
            default = Allowance() if principal.owner == LOCAL_OWNER else self.owner
        return default if stored is None else stored.allowance.over(default)
