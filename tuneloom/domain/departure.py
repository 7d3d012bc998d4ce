"""The record of an owner who leaves."""

from typing import ClassVar

from tuneloom.domain.record import Record


class Departure(Record):
    """An owner's wish, whose name is the id, that everything of theirs be removed. It goes when that is done."""

    collection: ClassVar[str] = "departures"
    requested_at: float
