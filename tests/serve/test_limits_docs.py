"""The page of the API says what limits there are, and their defaults."""

import re
from pathlib import Path

import yaml

from tuneloom.config import LimitsSettings, Settings
from tuneloom.domain import Allowance, Rates

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")


def part(heading: str) -> str:
    (found,) = [text for text in re.split(r"^#+ ", PAGE, flags=re.MULTILINE) if text.startswith(heading + "\n")]
    return found


def numbers(rates: Rates) -> list[str]:
    return [str(value) for _, value in rates if value is not None]


def test_every_limit_stands_there_with_its_defaults():
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \| ([^|]*) \|", part("Limits"), re.MULTILINE)
    written = {name: (owner, anonymous) for name, owner, anonymous in rows}
    assert written.keys() == Allowance.model_fields.keys()
    defaults = LimitsSettings()
    for name, (owner, anonymous) in written.items():
        for text, default in ((owner, defaults.owner), (anonymous, defaults.anonymous)):
            value = getattr(default, name)
            wanted = numbers(value) if isinstance(value, Rates) else [] if value is None else [str(value)]
            assert re.findall(r"\d+", text) == wanted, name


def test_every_setting_stands_there():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", part("Settings of limits"), re.MULTILINE))
    assert rows.keys() == LimitsSettings.model_fields.keys()
    defaults = LimitsSettings()
    assert rows["refused_per_minute"].startswith(f"{defaults.refused_per_minute}:")
    assert rows["redis_timeout_s"].startswith(f"{defaults.redis_timeout_s}:")
    assert rows["reserved_tokens"].startswith(f"{defaults.reserved_tokens}:")
    assert re.findall(r"\d+", rows["anonymous_address"].partition(":")[2]) == numbers(defaults.anonymous_address)


def test_the_example_of_redis_is_a_configuration():
    page = (Path(__file__).parents[2] / "docs" / "cloud.md").read_text(encoding="utf-8")
    (text,) = re.findall(
        r"^```yaml\n(.*?)^```$", page.partition("## Redis\n")[2].partition("\n## ")[0], re.MULTILINE | re.DOTALL
    )
    settings = Settings.model_validate({"home": "/nowhere", **yaml.safe_load(text)})
    assert (settings.gateway.replicas, settings.limits.owner.max_concurrent) == (3, 32)
