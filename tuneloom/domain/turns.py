"""What makes creates of one kind by one owner go one after another."""

from typing import ClassVar

from tuneloom.domain.record import Record


class Turn(Record):
    """The last create of a kind that is bounded by number. Its id is `{owner}:{kind}`, `at` when it was."""

    collection: ClassVar[str] = "turns"
    at: float
