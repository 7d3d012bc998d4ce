"""What every `Documents` and every `Blobs` must do: the sentences of the seams as tests.

An implementation joins by a class that inherits the tests and a fixture `documents_url` or `blobs_url` that names an
empty store. Everything is asked through the seam, so that other engines can join without a change here.
"""

from tests.store.contract.blobs import BlobsContract
from tests.store.contract.commits import OfCommits
from tests.store.contract.conditions import OfConditions
from tests.store.contract.orders import OfOrders
from tests.store.contract.records import OfRecords
from tests.store.contract.values import OfValues
from tests.store.contract.writers import OfWriters

__all__ = ["BlobsContract", "DocumentsContract"]


class DocumentsContract(OfRecords, OfCommits, OfValues, OfConditions, OfOrders, OfWriters):
    """All of it."""
