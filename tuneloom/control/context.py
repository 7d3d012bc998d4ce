"""What the HTTP API of control is given."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import anyio.to_thread
from starlette.requests import Request

from tuneloom.config import BaseSettings, Pepper, Settings
from tuneloom.domain import Principal, Scope
from tuneloom.errors import InvalidRequest, ModelNotFound, PermissionDenied
from tuneloom.store import Store

T = TypeVar("T")


@dataclass(frozen=True)
class ApiContext:
    """`poke` asks control to look at the jobs at once; it must not block and need not succeed.

    `forget_key` is told the id of each key that this process changes.
    """

    settings: Settings
    store: Store
    pepper: Pepper
    poke: Callable[[], None]
    forget_key: Callable[[str], None] = lambda id: None

    @property
    def bases_dir(self) -> Path:
        return self.settings.bases_dir

    def find_base(self, name: str) -> BaseSettings | None:
        """The base that `name` is the id or an alias of."""
        wanted = self.settings.base_aliases.get(name, name)
        return next((base for base in self.settings.bases if base.id == wanted), None)

    def find_base_id(self, name: str) -> str | None:
        base = self.find_base(name)
        return None if base is None else base.id

    def get_base(self, name: str, *, param: str = "model") -> BaseSettings:
        base = self.find_base(name)
        if base is None:
            error = ModelNotFound.named(name)
            error.param = param
            raise error
        return base

    def check_free_name(self, name: str, *, param: str) -> None:
        """Refuse a Model name that would hide a base or an alias."""
        if self.find_base(name) is not None or name in self.settings.base_aliases:
            raise InvalidRequest(f"`{name}` is the name of a base model. Choose another `{param}`.", param=param)


class FileRoutes:
    """What every group of routes that makes or reads files has of the service."""

    def __init__(self, context: ApiContext) -> None:
        self._settings = context.settings
        self._store = context.store
        self._records = context.store.records
        self._limits = context.settings.gateway
        self._timeout_s = context.settings.control.check_timeout_s


async def in_thread(work: Callable[..., T], *args: object) -> T:
    """Run blocking work of the store off the event loop."""
    return await anyio.to_thread.run_sync(work, *args)


def caller(request: Request, *scopes: Scope) -> Principal:
    """Who calls.

    Raises:
        PermissionDenied: their key lacks a scope, or it is for some models and this is about all that its owner has.
    """
    principal: Principal = request.state.principal
    for scope in scopes:
        principal.require(scope)
    if "account" in scopes and principal.models:
        raise PermissionDenied("This key is for some models only, and this is about all that its owner has.")
    return principal


def check_may_use(principal: Principal, model: str | None, name: str, *, param: str = "model") -> None:
    """Refuse what a key is not for as if there were no such thing. `name` is how it was asked for."""
    if not principal.may_use(model):
        error = ModelNotFound.named(name)
        error.param = param
        raise error


def query_int(request: Request, name: str, default: int, low: int, high: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else -1
    if not low <= number <= high:
        raise InvalidRequest(f"Invalid `{name}`: {text[:40]!r}. Use a whole number from {low} to {high}.", param=name)
    return number


def query_choice(request: Request, name: str, default: str, choices: Sequence[str]) -> str:
    value = request.query_params.get(name, default)
    if value not in choices:
        listed = " or ".join(f"`{choice}`" for choice in choices)
        raise InvalidRequest(f"Invalid `{name}`: {value[:40]!r}. Use {listed}.", param=name)
    return value
