"""What every record of the store is."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """A document of the store: frozen, strict about unknown fields, owned by somebody."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    collection: ClassVar[str]

    id: str
    owner: str
