"""Commits of this process do not wait for the disk, as no test cuts its power; those of processes that it starts do."""

from tuneloom.store import sqlite

AS_SHIPPED = sqlite.SYNCHRONOUS
sqlite.SYNCHRONOUS = "OFF"
