"""The script that measures what limits cost runs; its numbers are for quiet machines."""

import json
from pathlib import Path

from bench import limits
from tests.parts import servers


def test_each_side_is_measured_and_limits_are_really_counted(tmp_path: Path, redis_server: servers.Server):
    path = tmp_path / "found.json"
    limits.main(["--quick", "--json", str(path)])
    found = json.loads(path.read_text())
    measured = {measure["name"]: measure["values"] for measure in found["measures"]}
    for side in (limits.BARE, limits.UNLIMITED, limits.MEMORY, limits.REDIS, limits.LIBRARY):
        assert len(measured[side]) == 20 and min(measured[side]) > 0
    assert len(found["ratios"]) == 9
