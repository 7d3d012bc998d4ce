"""The records of `domain` as tables over documents. Knows how a record becomes a document, and no rule about any."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from tuneloom.domain import (
    AdapterPin,
    ApiKey,
    AuditEntry,
    Checkpoint,
    Departure,
    Draft,
    Drafter,
    Event,
    File,
    FileCheck,
    Job,
    Model,
    OwnerLimits,
    Progress,
    Record,
    Registration,
    Repeat,
    Speed,
    Turn,
    Upload,
    UploadPart,
    UsageFold,
    UsageMonth,
    UsagePart,
    UsageRow,
    Version,
    WebhookDelivery,
    WebhookEndpoint,
)
from tuneloom.errors import NotFound, TuneloomError
from tuneloom.store.base import Create, Delete, Document, Documents, Range, Replace, Scalar, Write

T = TypeVar("T", bound=Record)


@dataclass(frozen=True)
class Stored(Generic[T]):
    """A record as it was read, with the revision to write against."""

    value: T
    rev: str


class Table(Generic[T]):
    """One collection of one kind of record. Writes are only built here; `Records.commit` does them."""

    def __init__(self, documents: Documents, record_type: type[T]) -> None:
        self._documents = documents
        self._type = record_type
        self.collection = record_type.collection

    def find(self, id: str) -> Stored[T] | None:
        document = self._documents.find(self.collection, id)
        return self._load(document) if document else None

    def get(self, id: str) -> Stored[T]:
        """Raises NotFound; where a person named the thing, say it in the API's words instead."""
        stored = self.find(id)
        if stored is None:
            raise NotFound(f"There is no {self._type.__name__} `{id}`.")
        return stored

    def query(
        self,
        where: Mapping[str, Scalar] | None = None,
        *,
        order_by: str = "id",
        descending: bool = False,
        bounds: Range | None = None,
        limit: int | None = None,
        after: T | None = None,
    ) -> list[Stored[T]]:
        """Records by equality and one order, as `Documents.query`; `after` is the last record of the page before."""
        documents = self._documents.query(
            self.collection,
            where,
            order_by=order_by,
            descending=descending,
            bounds=bounds,
            limit=limit,
            after=None if after is None else (self._dump(after)[order_by], after.id),
        )
        return [self._load(document) for document in documents]

    def create(self, record: T) -> Create:
        return Create(self.collection, record.id, self._dump(record))

    def replace(self, stored: Stored[T], record: T) -> Replace:
        assert record.id == stored.value.id, "a record keeps its id"
        return Replace(self.collection, record.id, self._dump(record), stored.rev)

    def delete(self, stored: Stored[T]) -> Delete:
        return Delete(self.collection, stored.value.id, stored.rev)

    def _dump(self, record: T) -> dict[str, Any]:
        return record.model_dump(mode="json")

    def _load(self, document: Document) -> Stored[T]:
        try:
            return Stored(self._type.model_validate(document.data), document.rev)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise TuneloomError(
                f"The record `{self.collection}/{document.id}` does not fit this version of tuneloom: "
                f"`{where}`: {first['msg']}. Run the version that wrote it, or a newer one."
            ) from error


class Records:
    """Every kind of record that is kept. `commit` applies writes of any tables together or not at all."""

    def __init__(self, documents: Documents) -> None:
        self.documents = documents
        self.files = Table(documents, File)
        self.uploads = Table(documents, Upload)
        self.upload_parts = Table(documents, UploadPart)
        self.file_checks = Table(documents, FileCheck)
        self.drafts = Table(documents, Draft)
        self.drafters = Table(documents, Drafter)
        self.jobs = Table(documents, Job)
        self.progress = Table(documents, Progress)
        self.events = Table(documents, Event)
        self.speeds = Table(documents, Speed)
        self.checkpoints = Table(documents, Checkpoint)
        self.models = Table(documents, Model)
        self.versions = Table(documents, Version)
        self.registrations = Table(documents, Registration)
        self.adapter_pins = Table(documents, AdapterPin)
        self.keys = Table(documents, ApiKey)
        self.owner_limits = Table(documents, OwnerLimits)
        self.audit_entries = Table(documents, AuditEntry)
        self.departures = Table(documents, Departure)
        self.repeats = Table(documents, Repeat)
        self.turns = Table(documents, Turn)
        self.usage_parts = Table(documents, UsagePart)
        self.usage_folds = Table(documents, UsageFold)
        self.usage_rows = Table(documents, UsageRow)
        self.usage_months = Table(documents, UsageMonth)
        self.webhook_endpoints = Table(documents, WebhookEndpoint)
        self.webhook_deliveries = Table(documents, WebhookDelivery)

    @property
    def collections(self) -> tuple[str, ...]:
        """The names of all tables, in order."""
        return tuple(sorted(table.collection for table in vars(self).values() if isinstance(table, Table)))

    def commit(self, *writes: Write) -> dict[tuple[str, str], str]:
        """Apply all writes or none; returns the new revisions by (collection, id). See `Documents.commit`."""
        return self.documents.commit(writes)
