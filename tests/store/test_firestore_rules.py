"""The database is closed to every client that is not a server: asked as Firebase's web and mobile libraries ask."""

import base64
import json
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.parts import servers
from tests.store.firestore_indexes import TABLES
from tuneloom.store import open_documents
from tuneloom.store.base import Create

RULES = (Path(__file__).parent.parent.parent / "cluster" / "firestore.rules").read_text(encoding="utf-8")
CLAIMS: dict[str, dict[str, Any] | None] = {
    "anonymous": None,
    "signed_in": {},
    "admin": {"admin": True, "role": "owner", "scopes": ["admin"], "email": "root@example.com", "email_verified": True},
}
CALLS = ("get", "list", "query", "count", "create", "update", "delete", "commit")


class Project:
    """A project of the emulator under our rules, with one document in each collection."""

    def __init__(self, server: servers.Server) -> None:
        self.id = f"demo-{uuid.uuid4().hex[:12]}"
        self.documents = f"http://{server.address}/v1/projects/{self.id}/databases/(default)/documents"
        self.http = httpx.Client(timeout=30, trust_env=False)
        self.admin = f"http://{server.address}/emulator/v1/projects/{self.id}"
        self.put_rules(RULES)
        self.store = open_documents(f"firestore:{self.id}")
        self.store.commit([Create(collection, "one", {"owner": "alice"}) for collection in TABLES.values()])

    def ask(self, call: str, collection: str, who: str) -> int:
        """The HTTP status of the call."""
        claims = CLAIMS[who]
        headers = {} if claims is None else {"Authorization": f"Bearer {self.token(claims)}"}
        at, body = f"{self.documents}/{collection}", {"fields": {"owner": {"stringValue": "alice"}}}
        name = f"projects/{self.id}/databases/(default)/documents/{collection}/two"
        owned = {"field": {"fieldPath": "data.owner"}, "op": "EQUAL", "value": {"stringValue": "alice"}}
        asked = {"from": [{"collectionId": collection}], "where": {"fieldFilter": owned}}
        counted = {"structuredQuery": asked, "aggregations": [{"alias": "n", "count": {}}]}
        method, url, content = {
            "get": ("GET", f"{at}/one", None),
            "list": ("GET", at, None),
            "query": ("POST", f"{self.documents}:runQuery", {"structuredQuery": asked}),
            "count": ("POST", f"{self.documents}:runAggregationQuery", {"structuredAggregationQuery": counted}),
            "create": ("POST", f"{at}?documentId=two", body),
            "update": ("PATCH", f"{at}/one", body),
            "delete": ("DELETE", f"{at}/one", None),
            "commit": ("POST", f"{self.documents}:commit", {"writes": [{"update": {"name": name, **body}}]}),
        }[call]
        return self.http.request(method, url, json=content, headers=headers).status_code

    def put_rules(self, content: str) -> None:
        files = {"files": [{"name": "firestore.rules", "content": content}]}
        answer = self.http.put(f"{self.admin}:securityRules", json={"rules": files})
        assert answer.status_code == 200 and not answer.json().get("issues"), answer.text

    def expressions(self) -> list[dict[str, Any]]:
        """The expressions of the rules, with the values that they had."""
        answer = self.http.get(f"{self.admin}:ruleCoverage")
        answer.raise_for_status()
        return list(each_expression(answer.json().get("report", [])))

    def token(self, claims: dict[str, Any]) -> str:
        """What Firebase Auth's emulator would hand out; the database's emulator asks for no signature."""
        now = int(time.time())
        said = {
            **{"iss": f"https://securetoken.google.com/{self.id}", "aud": self.id, "sub": "alice", "user_id": "alice"},
            **{"iat": now, "auth_time": now, "exp": now + 3600, "firebase": {"sign_in_provider": "custom"}, **claims},
        }
        return f"{encoded({'alg': 'none', 'typ': 'JWT'})}.{encoded(said)}."


def encoded(part: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()


@pytest.fixture(scope="module")
def project(firestore_server: servers.Server) -> Iterator[Project]:
    made = Project(firestore_server)
    yield made
    made.store.close()
    made.http.close()


@pytest.mark.parametrize("who", CLAIMS)
@pytest.mark.parametrize("call", CALLS)
def test_nobody_is_let_in(project: Project, call: str, who: str) -> None:
    collections = [*TABLES.values(), "anything"]
    assert {collection: project.ask(call, collection, who) for collection in collections} == dict.fromkeys(
        collections, 403
    )


def test_no_document_was_touched_and_servers_are_let_in(project: Project) -> None:
    for collection in TABLES.values():
        assert [(found.id, found.data) for found in project.store.query(collection)] == [("one", {"owner": "alice"})]


def test_every_expression_of_the_rules_was_evaluated(project: Project) -> None:
    """The emulator reports what depends on the request; a plain `false` it does not."""
    assert re.findall(r"if (.+);", RULES) == ["false"]
    project.ask("get", "jobs", "admin")
    assert [each for each in project.expressions() if not each.get("values")] == []


def each_expression(node: Any) -> Iterator[dict[str, Any]]:
    for part in node if isinstance(node, list) else [node]:
        if "sourcePosition" in part:
            yield part
        yield from each_expression(part.get("children", []))


def test_open_rules_would_be_noticed(project: Project) -> None:
    """The calls are ones that succeed where rules allow them, and the coverage tells of conditions."""
    project.put_rules(RULES.replace("if false", "if request.auth != null"))
    try:
        assert {project.ask(call, "anything", "anonymous") for call in CALLS} == {403}
        assert {project.ask(call, "anything", "signed_in") for call in reversed(CALLS)} == {200, 409}
        assert project.expressions() and all(each.get("values") for each in project.expressions())
    finally:
        project.put_rules(RULES)
