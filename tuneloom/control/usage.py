"""Reports of what was used: buckets of hours or days, each with its groups. No HTTP."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from tuneloom.domain import Amounts, UsageKind, Used, hour_of, hour_start
from tuneloom.store import usage
from tuneloom.store.records import Records

WIDTHS = {"1h": 3600, "1d": 24 * 3600}

# What use can be grouped by and chosen by. A project and its user are one owner here.
FIELDS: Mapping[str, Callable[[str, Used], str]] = {
    "owner": lambda owner, used: owner,
    "project_id": lambda owner, used: owner,
    "user_id": lambda owner, used: owner,
    "api_key_id": lambda owner, used: used.key_id,
    "model": lambda owner, used: used.model,
    "base": lambda owner, used: used.base,
    "job_id": lambda owner, used: used.job_id,
    "kind": lambda owner, used: used.kind,
    "line_item": lambda owner, used: f"{used.model}, {used.kind}",
}

Group = dict[str, str | None]


@dataclass(frozen=True)
class Question:
    """What is asked for. `start` and `end` are Unix seconds; buckets are whole hours or days (UTC) that begin before
    `end`. `only` holds, by field, the values that count; `kinds` the kinds that do.
    """

    start: int
    end: int
    width: int
    limit: int
    group_by: tuple[str, ...] = ()
    only: Mapping[str, Collection[str]] = field(default_factory=dict)
    kinds: Collection[UsageKind] = ("inference", "training", "drafting")
    owner: str | None = None


@dataclass(frozen=True)
class Bucket:
    """What was used from `start` until before `end`: a group's fields (empty ones None), and how much."""

    start: int
    end: int
    groups: tuple[tuple[Group, Amounts], ...]


def ask(records: Records, question: Question) -> tuple[list[Bucket], int | None]:
    """The first buckets, empty ones too, and where the rest begins, if there is one."""
    width = question.width
    first = question.start // width * width
    last = -(-question.end // width) * width
    end = min(last, first + question.limit * width)
    sums: dict[tuple[int, tuple[str, ...]], Amounts] = {}
    if first < end:

        def bucket_and_group(hour: str, owner: str, used: Used) -> tuple[int, tuple[str, ...]] | None:
            values = _group(question, owner, used)
            return None if values is None else (int(hour_start(hour)) // width * width, values)

        sums = usage.add_up(records, hour_of(first), hour_of(end - 1), bucket_and_group, owner=question.owner)
    groups: dict[int, list[tuple[Group, Amounts]]] = {}
    for (start, values), amounts in sorted(sums.items(), key=lambda item: item[0]):
        groups.setdefault(start, []).append((_named(question, values), amounts))
    buckets = [Bucket(at, at + width, tuple(groups.get(at, ()))) for at in range(first, end, width)]
    return buckets, end if end < last else None


def total(records: Records, question: Question) -> Iterator[tuple[Group, Amounts]]:
    """The groups of all the time from `start` to `end` in whole hours, as one bucket."""
    hours = hour_of(question.start), hour_of(question.end)

    def group(hour: str, owner: str, used: Used) -> tuple[str, ...] | None:
        return _group(question, owner, used)

    sums = usage.add_up(records, *hours, group, owner=question.owner)
    for values, amounts in sorted(sums.items()):
        yield _named(question, values), amounts


def _group(question: Question, owner: str, used: Used) -> tuple[str, ...] | None:
    if used.kind not in question.kinds:
        return None
    if any(FIELDS[name](owner, used) not in values for name, values in question.only.items()):
        return None
    return tuple(FIELDS[name](owner, used) for name in question.group_by)


def _named(question: Question, values: tuple[str, ...]) -> Group:
    return {name: value or None for name, value in zip(question.group_by, values, strict=True)}
