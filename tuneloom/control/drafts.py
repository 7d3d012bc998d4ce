"""Drafts as records: created, looked up, cancelled, their rows read while they come. No HTTP."""

import itertools
import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from tuneloom.config import DraftingSettings
from tuneloom.control import audit, files, turns
from tuneloom.control.drafting.collect import batches_by_time
from tuneloom.control.drafting.language import LANGUAGES
from tuneloom.control.drafting.ledger import read_rows
from tuneloom.control.drafting.replies import encode
from tuneloom.control.retry import retry
from tuneloom.domain import (
    ROLE_TEMPERATURES,
    Actor,
    AuditTarget,
    Draft,
    Drafter,
    DraftFormat,
    DraftPrice,
    DraftRole,
    DraftSpec,
)
from tuneloom.errors import Conflict, InvalidFile, InvalidRequest, NotFound, RateLimited
from tuneloom.rows import Scan, raw_rows, read_page
from tuneloom.rows.fields import Wrong
from tuneloom.rows.parse import parse
from tuneloom.store import Store
from tuneloom.store.base import BlobNotFound, Write
from tuneloom.store.records import Records, Stored

# Of a seed file so much counts.
MAX_SEED_ROWS, MAX_SEED_BYTES = 1000, 4 << 20
PAGE_BYTES = 4 << 20
RETRY_AFTER_S = 30
# The format of seed rows, as a file check names it.
_SEED_FORMATS: dict[DraftFormat, tuple[str, ...]] = {
    "chat": ("`messages`",),
    "instruction": ("`instruction`/`output`",),
    "text": ("`text`",),
    "preference": ("`input`/`preferred_output`", "`prompt`/`chosen`/`rejected`"),
}


def get_draft(records: Records, owner: str, id: str) -> Stored[Draft]:
    stored = records.drafts.find(id)
    if stored is None or stored.value.owner != owner:
        raise NotFound(f"No such Draft object: {id[:200]}", param="id")
    return stored


def drafters_of(records: Records, draft: Draft) -> list[Drafter]:
    """Those of a draft that runs, in order; none of another."""
    if draft.state != "running":
        return []
    found = records.drafters.query({"draft_id": draft.id})
    return sorted((stored.value for stored in found), key=lambda drafter: drafter.number)


def take_room(records: Records, owner: str, settings: DraftingSettings) -> Write:
    """The write that goes with a new draft, so that two at once do not take one place.

    Raises:
        RateLimited: the owner has as many drafts under way as they may.
    """
    turn, limit = turns.take(records, owner, "drafts"), settings.max_drafts_per_owner
    if len(records.drafts.query({"owner": owner, "is_open": True}, limit=limit)) >= limit:
        raise RateLimited(
            f"{limit} of your drafts are under way. Wait for one to end, or cancel it.",
            code="too_many_drafts",
            retry_after_s=RETRY_AFTER_S,
        )
    return turn


def choose_provider(settings: DraftingSettings, name: str | None, model: str | None) -> tuple[str, str]:
    """The provider and the model that were asked for, or the default ones.

    Raises:
        InvalidRequest: there is none; the message names the setting.
    """
    if not settings.providers:
        raise InvalidRequest(
            "No provider drafts rows here: `drafting.providers` of `config.yaml` is empty. Add one there.",
            param="provider",
            code="no_provider",
        )
    name = next(iter(settings.providers)) if name is None else name
    if name not in settings.providers:
        listed = ", ".join(f"`{known}`" for known in settings.providers)
        raise InvalidRequest(f"Invalid `provider`: there is no {name[:80]!r}. Use {listed}.", param="provider")
    models = settings.providers[name].models
    if model is not None and model not in models:
        listed = ", ".join(f"`{known}`" for known in models)
        raise InvalidRequest(f"Invalid `model`: `{name}` has {listed} here, not {model[:80]!r}.", param="model")
    return name, model or models[0]


def price_of(settings: DraftingSettings, provider: str, currency: str) -> DraftPrice | None:
    configured = settings.providers[provider]
    if configured.input_price is None or configured.output_price is None:
        return None
    return DraftPrice(input=configured.input_price, output=configured.output_price, currency=currency)


def deal(roles: Sequence[DraftRole] | None, drafters: int | None) -> tuple[DraftRole, ...]:
    """A role for each drafter: the given ones in turn, or all there are; a single one is `standard`."""
    if roles is None:
        roles = ["standard"] if drafters in (None, 1) else list(ROLE_TEMPERATURES)
    return tuple(itertools.islice(itertools.cycle(roles), drafters or len(roles)))


def check_language(code: str | None) -> None:
    if code is not None and code not in LANGUAGES:
        raise InvalidRequest(
            f"Invalid `language`: {code[:40]!r}. Use a code of ISO 639-1, one of {', '.join(LANGUAGES)}.",
            param="language",
        )


def check_seeds(rows: Sequence[dict[str, Any]], format_: DraftFormat, param: str) -> bytes:
    """Seed rows as JSON Lines. Raises InvalidRequest naming the one that is wrong, or of another format."""
    lines = []
    scan = Scan(method="dpo" if format_ == "preference" else "supervised")
    for index, row in enumerate(rows):
        try:
            line = encode(row)
            scan.row(parse(line))
            if scan.format not in _SEED_FORMATS[format_]:
                wanted = " or ".join(_SEED_FORMATS[format_])
                raise Wrong(f"It has the format {scan.format}; those of a draft of `{format_}` have {wanted}.")
        except (Wrong, ValueError) as problem:
            raise InvalidRequest(f"Invalid `{param}`: row {index + 1:,}: {problem}", param=param) from None
        lines.append(line + b"\n")
    return b"".join(lines)


def read_seed_file(store: Store, owner: str, id: str) -> list[dict[str, Any]]:
    """The first rows of a training file of this owner's."""
    found = files.find_file(store.records, owner, id, time.time())
    if found is None:
        raise NotFound(f"No such File object: {id[:200]}", param="seed_file")
    if found.value.purpose != "fine-tune":
        raise InvalidFile(
            f"The file `{id}` has the purpose `{found.value.purpose}`, not `fine-tune`.", param="seed_file"
        )
    rows, size = [], 0
    try:
        with store.blobs.open(found.value.blob) as file:
            for row in itertools.islice(raw_rows(file), MAX_SEED_ROWS):
                size += len(row.raw or b"")
                if size > MAX_SEED_BYTES:
                    break
                try:
                    rows.append(parse(row.raw or b""))
                except Wrong as problem:
                    message = f"Invalid `seed_file`: row {row.number:,}: {problem}"
                    raise InvalidRequest(message, param="seed_file") from None
    except BlobNotFound as error:
        raise NotFound(f"No such File object: {id[:200]}", param="seed_file") from error
    return rows


def new_draft(owner: str, id: str, spec: DraftSpec, target_file: str, key_id: str) -> Draft:
    return Draft(id=id, owner=owner, spec=spec, created_at=time.time(), target_file=target_file, key_id=key_id)


def new_seed() -> int:
    return secrets.randbelow(2**31)


def cancel(records: Records, owner: str, id: str, actor: Actor) -> Draft:
    """Ask for the end of a draft; control makes a File of what there is. Done again, it changes nothing.

    Raises:
        Conflict: it has ended by itself.
    """

    def once() -> Draft:
        stored = get_draft(records, owner, id)
        draft = stored.value
        if draft.cancel_requested_at is not None or draft.state == "cancelled":
            return draft
        if draft.is_terminal:
            raise Conflict(f"The draft `{id}` has ended: it is `{draft.state}`.", code="draft_ended")
        after = draft.model_copy(update={"cancel_requested_at": time.time()})
        entry = audit.entry(actor, "draft.cancelled", target_of(after))
        records.commit(records.drafts.replace(stored, after), entry)
        return after

    return retry(once)


def target_of(draft: Draft) -> AuditTarget:
    return AuditTarget(owner=draft.owner, type="draft", id=draft.id)


def read_rows_of(store: Store, draft: Draft, *, after: int, limit: int) -> tuple[list[dict[str, Any]], bool]:
    """Rows behind row `after`, and whether there are more: those of its File, or those that have come until now."""
    if draft.file_id is not None:
        found = files.find_file(store.records, draft.owner, draft.file_id, time.time())
        if found is None:
            raise NotFound(f"The File of the draft, `{draft.file_id}`, was deleted.", param="id")
        with store.blobs.open(found.value.blob) as file:
            page = read_page(file, after=after, limit=limit, max_bytes=PAGE_BYTES)
        return [{"row": row.number, "data": json.loads(row.json or "null")} for row in page.rows], page.has_more
    rows: list[dict[str, Any]] = []
    number = size = 0
    for batch in batches_by_time(drafters_of(store.records, draft)):
        if number + batch.rows <= after:
            number += batch.rows
            continue
        for data in read_rows(store.blobs, batch):
            number += 1
            if number <= after:
                continue
            size += len(encode(data))
            if len(rows) == limit or (rows and size > PAGE_BYTES):
                return rows, True
            rows.append({"row": number, "data": data})
    return rows, False
