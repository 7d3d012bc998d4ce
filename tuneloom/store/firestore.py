"""Documents in a Firestore database, shared by any number of processes and machines. Knows no record types.

A commit is one write batch, applied by Firestore whole or not at all. Its preconditions are Firestore's: a revision is
the time of a document's last update. `firestore_values` tells how a record lies in a document.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tuneloom.errors import InvalidRequest, Overloaded, TooLarge
from tuneloom.store.base import (
    CommitUnknown,
    Create,
    Document,
    Increment,
    Range,
    Replace,
    Scalar,
    StoreConflict,
    Write,
)
from tuneloom.store.firestore_api import NOT_APPLIED, PASSING, RETRY_AFTER_S, ApiError, FirestoreApi, Tries
from tuneloom.store.firestore_commit import Attempt, KnownNumbers
from tuneloom.store.firestore_query import structured
from tuneloom.store.firestore_values import COMMIT, commit_of, from_fields
from tuneloom.store.limits import check_collection, check_size, check_writes, encode, is_document_id

DEFAULT_DATABASE = "(default)"
# Documents of one call; a longer result is read in several, all as of the same moment.
PAGE = 300

_CONFLICTS = {"ALREADY_EXISTS", "FAILED_PRECONDITION", "NOT_FOUND"}
# A write asks for a revision later than the document's last, such as that of one of its name that is gone.
_NEWER_REVISION = re.compile("^Invalid base version")
# The same statuses as of conflicts, but of the database and not of a document.
_NO_DATABASE = re.compile(r"^The database .* does not exist|Datastore Mode", re.IGNORECASE)


class FirestoreDocuments:
    """`Documents` over one database of a project.

    An Increment reads its document once, when this process adds to that field for the first time: Firestore would put
    the number in place of anything else. So a field that is added to must stay a number in all processes. An integer
    that would pass 64 bits stays at the largest one.
    """

    def __init__(self, project: str, database: str = DEFAULT_DATABASE) -> None:
        self._api = FirestoreApi(project, database)
        self._numbers = KnownNumbers()

    @classmethod
    def at(cls, url: str) -> "FirestoreDocuments":
        """The database at `firestore:PROJECT` or `firestore:PROJECT/DATABASE`."""
        project, slash, database = url.removeprefix("firestore:").partition("/")
        if not project or "/" in database or bool(slash) != bool(database):
            raise InvalidRequest(
                f"`{url}` names no Firestore database. Use `firestore:PROJECT` or `firestore:PROJECT/DATABASE`.",
                param="documents_url",
            )
        return cls(project, database or DEFAULT_DATABASE)

    def find(self, collection: str, id: str) -> Document | None:
        check_collection(collection)
        if not is_document_id(id):
            return None
        return self._get([(collection, id)]).get((collection, id))

    def query(
        self,
        collection: str,
        where: Mapping[str, Scalar] | None = None,
        *,
        order_by: str = "id",
        descending: bool = False,
        bounds: Range | None = None,
        limit: int | None = None,
        after: tuple[Scalar, str] | None = None,
    ) -> list[Document]:
        if limit is not None and limit < 0:
            raise InvalidRequest(f"`limit` is {limit}. Use 0 or more.")
        found: list[Document] = []
        moment: dict[str, str] = {}
        while True:
            query = structured(
                self._api.root,
                collection,
                where or {},
                order_by,
                descending=descending,
                bounds=bounds or Range(),
                after=after,
            )
            size = PAGE if limit is None else min(PAGE, limit - len(found))
            if query is None or size == 0:
                return found
            answer = self._api.read("runQuery", {"structuredQuery": {**query, "limit": size}, **moment})
            page = [_document(part["document"]) for part in answer if "document" in part]
            found += page
            if len(page) < size:
                return found
            moment = {"readTime": answer[-1]["readTime"]}
            after = (page[-1].id if order_by == "id" else page[-1].data[order_by], page[-1].id)

    def commit(self, writes: Sequence[Write]) -> dict[tuple[str, str], str]:
        check_writes(writes)
        check_size([encode(write.data) for write in writes if isinstance(write, Create | Replace)])
        if not writes:
            return {}
        self._check_numbers([write for write in writes if isinstance(write, Increment)])
        attempt = Attempt(self._api.root, writes)
        try:
            return self._send(attempt)
        finally:
            self._numbers.forget(write for write in writes if not isinstance(write, Increment))

    def close(self) -> None:
        self._api.close()

    def _send(self, attempt: Attempt) -> dict[tuple[str, str], str]:
        """Send it until it is known what became of it, or time is up.

        Two tries of one commit cannot both be applied if it is repeatable: the first changes what the second asks for,
        short of another writer who deletes in between what the first created.
        A conflict after a try whose answer was lost may be with that try; the documents tell by the id of their commit.
        """
        tries = Tries()
        may_be_applied = False
        while True:
            try:
                return attempt.revs(self._api.call("commit", attempt.body))
            except ApiError as error:
                may_be_applied |= error.status in PASSING - NOT_APPLIED
                if _is_conflict(error):
                    if may_be_applied and (revs := self._applied(attempt)) is not None:
                        return revs
                    raise StoreConflict(f"{attempt.names} changed, exists or is gone: {error.message}") from error
                if "exceeds maximum size" in error.message or "exceeds the maximum" in error.message:
                    raise TooLarge(f"Firestore takes no commit of this size: {error.message}") from error
                if error.status not in PASSING:
                    raise self._api.translated(error) from error
                if may_be_applied and not attempt.is_repeatable:
                    if (revs := self._applied(attempt)) is not None:
                        return revs
                    raise self._unknown(attempt) from error
                if not tries.pause():
                    raise (self._unknown(attempt) if may_be_applied else self._api.translated(error)) from error

    def _applied(self, attempt: Attempt) -> dict[tuple[str, str], str] | None:
        """The revisions that a commit made, if one of its documents still tells of it."""
        try:
            found = self._get(attempt.keys, with_data=False)
        except Overloaded as error:
            raise self._unknown(attempt) from error
        own = {key: document for key, document in found.items() if document.data[COMMIT] == attempt.id}
        if not own and (attempt.written or found):
            return None
        # What another writer has changed since has a revision that cannot be known here, and that would not help.
        return {key: own[key].rev if key in own else attempt.id for key in attempt.written}

    def _unknown(self, attempt: Attempt) -> CommitUnknown:
        return CommitUnknown(
            f"Firestore did not say whether {attempt.names} was written. Read it, and try again if it was not.",
            retry_after_s=RETRY_AFTER_S,
        )

    def _check_numbers(self, writes: list[Increment]) -> None:
        """Raise InvalidRequest if a document holds something else in a field that is to be added to."""
        unsure = [write for write in writes if write not in self._numbers]
        found = self._get({(write.collection, write.id) for write in unsure}) if unsure else {}
        for write in unsure:
            document = found.get((write.collection, write.id))
            if document is None:
                continue
            value = document.data.get(write.field, 0)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InvalidRequest(f"`{write.collection}/{write.id}` has no number in `{write.field}` to add to.")
            self._numbers.learn(write)

    def _get(self, keys: Iterable[tuple[str, str]], *, with_data: bool = True) -> dict[tuple[str, str], Document]:
        names = [f"{self._api.root}/{collection}/{id}" for collection, id in keys]
        mask = {} if with_data else {"mask": {"fieldPaths": [COMMIT]}}
        answer = self._api.read("batchGet", {"documents": names, **mask})
        found = [_document(part["found"], with_data=with_data) for part in answer if "found" in part]
        return {(document.collection, document.id): document for document in found}


def _document(found: Mapping[str, Any], *, with_data: bool = True) -> Document:
    _, collection, id = found["name"].rsplit("/", 2)
    fields = found.get("fields", {})
    data = from_fields(fields) if with_data else {COMMIT: commit_of(fields)}
    return Document(collection, id, found["updateTime"], data)


def _is_conflict(error: ApiError) -> bool:
    if error.status == "INVALID_ARGUMENT":
        return bool(_NEWER_REVISION.search(error.message))
    return error.status in _CONFLICTS and not _NO_DATABASE.search(error.message)
