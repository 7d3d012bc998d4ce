"""What is sent to the webhooks of owners, and to where it may go."""

from pathlib import Path

from pydantic import Field

from tuneloom.config.section import Section


class WebhookSettings(Section):
    allow_private: bool = Field(
        False,
        description="send to private and loopback addresses and over http too; for one machine or a closed network",
    )
    key_file: Path | None = Field(
        None,
        description="file with the keys that encrypt signing secrets, one a line, the newest first, the same on every "
        "machine of a cluster; None: one in `home`, made at first use",
    )
    max_endpoints_per_owner: int = Field(20, ge=1, le=50, description="endpoints of one owner")
    max_sending: int = Field(16, ge=1, le=256, description="deliveries that are sent at once")
    max_sending_per_owner: int = Field(4, ge=1, description="of which one owner may have so many")
    max_sending_per_endpoint: int = Field(1, ge=1, description="and one endpoint")
    timeout_s: float = Field(15.0, gt=0, le=30, description="from the connection to the end of the answer")
    poll_s: float = Field(1.0, gt=0, description="how often the outbox is looked at")
    disable_after_s: float = Field(
        5 * 86400.0,
        gt=0,
        description="an endpoint that has only failed for so long is disabled when a delivery is given up",
    )
    keep_s: float = Field(30 * 86400.0, gt=0, description="how long the log of deliveries goes back")
