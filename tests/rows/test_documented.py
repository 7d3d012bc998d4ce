import re
from pathlib import Path

from tests.rows.conftest import scan

DATA = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8").split("\n## ")[1]


def test_the_rows_of_the_training_page_are_rows() -> None:
    supervised, preferences = re.findall(r"^```jsonl\n(.*?)^```$", DATA, re.MULTILINE | re.DOTALL)
    for text, method in ((supervised, "supervised"), (preferences, "dpo")):
        lines = text.splitlines()
        assert len(lines) >= 4
        # Each alone, since a file has one format.
        for line in lines:
            assert scan(line, method=method)[1].problems == [], line
