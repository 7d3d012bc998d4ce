"""One large blob into a store and out of it: MB/s, and the memory that it takes beside what the process has anyway.

The bytes are made on the way, so no more of them than a piece is ever in memory. `--url` names the store: the bucket
must be there. Without it the store is a folder of this machine.
"""

import argparse
import hashlib
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench.machine import ForeignLoad, describe
from bench.report import Report
from tuneloom.store import open_blobs
from tuneloom.store.base import Blobs

_CHUNK = 1 << 20
_WANTED_GROWTH_MB = 100.0


def chunks(size_mb: int, seed: int) -> Iterator[bytes]:
    numbers = np.random.default_rng(seed)
    for _ in range(size_mb):
        yield numbers.bytes(_CHUNK)


def write(blobs: Blobs, key: str, size_mb: int) -> float:
    """MB/s."""
    started = time.perf_counter()
    blobs.write(key, chunks(size_mb, 0))
    return size_mb / (time.perf_counter() - started)


def read(blobs: Blobs, key: str, size_mb: int) -> float:
    """MB/s, with the bytes compared by their hash."""
    wanted = hashlib.sha256()
    for chunk in chunks(size_mb, 0):
        wanted.update(chunk)
    started = time.perf_counter()
    with blobs.open(key) as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    elapsed_s = time.perf_counter() - started
    assert found == wanted.hexdigest()
    return size_mb / elapsed_s


def peak_mb() -> float:
    """The most memory that this process has held, in MB."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024


def main(arguments: list[str] | None = None) -> Report:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--url", help="`gs://BUCKET/PREFIX` or `file:FOLDER`")
    options.add_argument("--mb", type=int, default=1024)
    options.add_argument("--reps", type=int, default=1)
    options.add_argument("--json", type=Path, help="also write the result there")
    parsed = options.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        url = parsed.url or f"file:{folder}"
        report = Report("blobs", describe(0), {"mb": parsed.mb, "url": url.partition(":")[0]})
        blobs = open_blobs(url)
        # What a first small call takes, the libraries among it, is not for the bytes.
        key = f"bench/{secrets.token_hex(8)}"
        blobs.write(f"{key}/small", b"x")
        blobs.read(f"{key}/small")
        before_mb = peak_mb()
        written, got = [], []
        with ForeignLoad() as load:
            for repetition in range(parsed.reps):
                name = f"{key}/{repetition}"
                written.append(write(blobs, name, parsed.mb))
                got.append(read(blobs, name, parsed.mb))
                blobs.delete(name)
        report.foreign_share = load.share
        report.add("written", "MB/s", written)
        report.add("read", "MB/s", got)
        report.add("peak memory", "MB", [peak_mb()])
        report.ratio(
            "memory beside the first small call", peak_mb() - before_mb, _WANTED_GROWTH_MB, is_limit=True, unit=" MB"
        )
        blobs.delete(f"{key}/small")
        report.finish(parsed.json)
    return report


if __name__ == "__main__":
    main()
