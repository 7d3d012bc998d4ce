"""The audit log."""

from pydantic import Field

from tuneloom.config.section import Section


class AuditSettings(Section):
    keep_days: int = Field(400, ge=1, le=3650, description="how long entries are kept")
