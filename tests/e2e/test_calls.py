"""Every call of the conformance table, by the installed client. `make conformance` drives the other clients too."""

import pytest

from tests.conformance.driver import run
from tests.e2e.conftest import Home

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def test_every_call_of_the_client_answers_as_it_should(home: Home) -> None:
    results = run(home.url, home.admin_key)
    assert [(result.name, result.reason) for result in results if not result.ok] == []
    assert len(results) > 100
