"""People who sign in with Firebase Auth, and what must not be set where they are real. See docs/cloud.md."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from tuneloom.config.section import Section
from tuneloom.errors import InvalidRequest

if TYPE_CHECKING:
    from tuneloom.config.settings import Settings

AUTH_EMULATOR = "FIREBASE_AUTH_EMULATOR_HOST"
EMULATORS = (AUTH_EMULATOR, "FIRESTORE_EMULATOR_HOST", "STORAGE_EMULATOR_HOST")
# Firebase's convention: such a project exists in emulators only.
DEMO = "demo-"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
# Where Google publishes what signs ID tokens, and what signs App Check's.
CERTIFICATES_URL = "https://www.googleapis.com/robot/v1/metadata/x509/securetoken@system.gserviceaccount.com"
APP_CHECK_KEYS_URL = "https://firebaseappcheck.googleapis.com/v1/jwks"


def _check_url(url: str) -> str:
    parts = urlsplit(url)
    is_here = parts.scheme == "http" and parts.hostname in _LOOPBACK
    if not is_here and not (parts.scheme == "https" and parts.hostname):
        raise ValueError("use https: whoever can change the answer can sign in as anybody")
    return url


KeysUrl = Annotated[str, AfterValidator(_check_url)]
Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]


class IdentitySettings(Section):
    """Without a project nobody signs in: API keys are the only way."""

    firebase_project: str | None = Field(
        None, pattern=r"^[a-z0-9][a-z0-9.:-]{2,62}[a-z0-9]$", description="project id; None: no sign-in"
    )
    certificates_url: KeysUrl = Field(CERTIFICATES_URL, description="what signs ID tokens")
    clock_leeway_s: float = Field(
        10.0, ge=0, le=60, description="how far a token may come from the future or be over, by Google's clock"
    )
    revocation_check_s: float | None = Field(
        30.0, gt=0, le=60, description="how long an answer that a user is still welcome is used; None: never asked"
    )
    anonymous: bool = Field(True, description="whether people who signed in anonymously are let in")
    anonymous_scopes: tuple[Literal["inference", "training"], ...] = Field(
        ("inference", "training"), description="what people who signed in anonymously may do"
    )
    admins: tuple[Text, ...] = Field((), description="uids and verified e-mail addresses with the scope `admin`")
    allowed_domains: tuple[Text, ...] = Field(
        (), description="domains of the verified e-mail addresses that are let in, nobody else; empty: everybody"
    )
    app_check: Literal["off", "required"] = Field("off", description="whether ID tokens need an App Check token beside")
    app_check_project_number: str | None = Field(
        None, pattern=r"^[0-9]{1,20}$", description="of the project's settings, for `app_check`"
    )
    app_check_apps: tuple[Text, ...] = Field((), description="ids of the apps that may call; empty: all of the project")
    app_check_keys_url: KeysUrl = Field(APP_CHECK_KEYS_URL, description="what signs App Check tokens")

    @model_validator(mode="after")
    def _check_project_number(self) -> "IdentitySettings":
        if self.app_check == "required" and not self.app_check_project_number:
            raise ValueError("`app_check: required` needs `app_check_project_number`, from the project's settings")
        return self


def is_production(settings: "Settings") -> bool:
    """What `production` says, else whether a cloud project is configured that is not an emulator's."""
    if settings.production is not None:
        return settings.production
    kind, _, rest = settings.documents.partition(":")
    projects = [settings.identity.firebase_project or "", rest.split("/")[0] if kind == "firestore" else ""]
    return any(project and not project.startswith(DEMO) for project in projects)


def check_production(settings: "Settings", environment: Mapping[str, str]) -> None:
    """Refuse a variable that turns real services into emulators.

    Raises:
        InvalidRequest: in production one is set; the message names it. With Auth's, anybody could sign in as anybody.
    """
    present = [name for name in EMULATORS if environment.get(name)]
    if present and is_production(settings):
        raise InvalidRequest(
            f"The environment variable `{present[0]}` is set, which is for tests: with it, tuneloom would use an "
            f"emulator instead of Google's service. Unset it (`unset {present[0]}`), or use a project whose id begins "
            f"with `{DEMO}`, or set `production: false` in config.yaml for an installation that only tests.",
            param="production",
        )
