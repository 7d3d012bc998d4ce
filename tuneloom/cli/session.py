"""What commands share: the settings, a client of the running API, and ways to print."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuneloom import config
from tuneloom.config import Settings
from tuneloom.errors import Conflict, NotFound, TuneloomError

if TYPE_CHECKING:
    import httpx

    from tuneloom.store import Store

REQUEST_TIMEOUT_S = 60.0

Json = Annotated[bool, typer.Option("--json", help="For programs.")]
Limit = Annotated[int, typer.Option(help="At most so many.", min=1, max=100)]


def home_folder(context: typer.Context) -> Path:
    return Path(context.find_root().obj or ".tuneloom").absolute()


def read_settings(context: typer.Context) -> Settings:
    return config.load(home_folder(context))


@contextmanager
def open_store(context: typer.Context) -> "Iterator[Store]":
    """The store of the chosen home, whether anything runs or not; in production never an emulator."""
    from tuneloom import store

    settings = read_settings(context)
    config.check_production(settings, os.environ)
    opened = store.open_store(settings)
    try:
        yield opened
    finally:
        opened.close()


class Api:
    """The API of the running installation, called with its admin key.

    Every call raises a TuneloomError with the message of the API, or with what to do if it is not running.
    """

    def __init__(self, settings: Settings) -> None:
        import httpx

        from tuneloom import cluster, up

        state = cluster.read_state(settings.home)
        if state is None or not state.is_up:
            raise Conflict("tuneloom is not running. Start it: `tuneloom up`.")
        self._key_file = settings.home / up.KEY_FILE
        headers = {"Authorization": f"Bearer {up.read_admin_key(settings)}"}
        self._client = httpx.Client(base_url=state.api_url, headers=headers, timeout=REQUEST_TIMEOUT_S, trust_env=False)

    def get(self, path: str, **params: Any) -> Any:
        return self._call("GET", path, params={k: v for k, v in params.items() if v is not None}).json()

    def post(self, path: str, body: dict[str, Any] | None = None, **options: Any) -> Any:
        return self._call("POST", path, **({"json": body} if body is not None else {}), **options).json()

    def delete(self, path: str) -> Any:
        return self._call("DELETE", path).json()

    def download(self, path: str) -> bytes:
        return self._call("GET", path).content

    def save(self, path: str, target: Path, **params: Any) -> None:
        """Write what a call answers to a new file, which appears once it is whole.

        Raises:
            Conflict: `target` is there already.
        """
        import httpx

        if target.exists():
            raise Conflict(f"{target} is there already. Remove it, or choose another file with `--to`.")
        part = target.with_name(f".{target.name}.part")
        try:
            with self._client.stream("GET", path, params=params) as response:
                if not response.is_success:
                    response.read()
                    raise (NotFound if response.status_code == 404 else TuneloomError)(_message(response))
                with part.open("wb") as file:
                    for chunk in response.iter_bytes():
                        file.write(chunk)
            part.rename(target)
        except httpx.TransportError as error:
            raise TuneloomError(f"The answer was not whole ({type(error).__name__}). Try again.") from error
        finally:
            part.unlink(missing_ok=True)

    def events(self, path: str) -> "Iterator[dict[str, Any]]":
        """The server-sent events of a path, until the server ends them."""
        import httpx

        try:
            with self._client.stream("GET", path) as response:
                if not response.is_success:
                    response.read()
                    raise (NotFound if response.status_code == 404 else TuneloomError)(_message(response))
                for line in response.iter_lines():
                    if line == "data: [DONE]":
                        return
                    if line.startswith("data: "):
                        yield json.loads(line.removeprefix("data: "))
        except httpx.TransportError as error:
            raise TuneloomError(f"The events broke off ({type(error).__name__}). Try again.") from error

    def _call(self, method: str, path: str, **options: Any) -> "httpx.Response":
        import httpx

        try:
            response = self._client.request(method, path, **options)
        except httpx.TransportError as error:
            raise TuneloomError(
                f"The API at {self._client.base_url} does not answer ({type(error).__name__}). See `tuneloom status`."
            ) from error
        if response.is_success:
            return response
        if response.status_code == 401:
            raise TuneloomError(f"The API refuses the key in {self._key_file}. `tuneloom up` makes another.")
        raise (NotFound if response.status_code == 404 else TuneloomError)(_message(response))


def _message(response: "httpx.Response") -> str:
    try:
        return response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"The API answered {response.status_code}: {response.text[:300]}"


def show_time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def print_rows(header: list[str], rows: list[list[str]], *, none: str = "") -> None:
    """A table as plain text, whole ids and all, so that it can be cut and searched.

    Without rows nothing goes to stdout, and `none` to stderr.
    """
    if not rows:
        if none:
            typer.echo(none, err=True)
        return
    table = [header, *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    for row in table:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))
