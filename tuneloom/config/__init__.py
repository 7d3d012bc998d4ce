"""The settings of an installation: one tree, read once at the start and handed on in pieces.

A file `config.yaml` in the home folder overrides the defaults, which run on one machine without a cloud. The
environment says only where home is (`TUNELOOM_HOME`) and is read by entry points, never by an import.
"""

from tuneloom.config.audit import AuditSettings
from tuneloom.config.drafting import DraftingSettings, DraftProviderSettings
from tuneloom.config.engine import BaseSettings, EngineSettings
from tuneloom.config.gateway import GatewaySettings
from tuneloom.config.identity import AUTH_EMULATOR, IdentitySettings, check_production
from tuneloom.config.limits import LimitsSettings
from tuneloom.config.pepper import HashedSecret, Pepper, read_pepper, rotate_pepper
from tuneloom.config.secrets import SIGNING_KEY_FILE, read_signing_key, read_webhook_keys
from tuneloom.config.section import Section
from tuneloom.config.settings import CONFIG_FILE, DEFAULT_BASE, Settings, load
from tuneloom.config.train import ControlSettings, TrainSettings
from tuneloom.config.usage import UsageSettings
from tuneloom.config.webhooks import WebhookSettings

__all__ = [
    "AUTH_EMULATOR",
    "CONFIG_FILE",
    "DEFAULT_BASE",
    "SIGNING_KEY_FILE",
    "AuditSettings",
    "BaseSettings",
    "ControlSettings",
    "DraftProviderSettings",
    "DraftingSettings",
    "EngineSettings",
    "GatewaySettings",
    "HashedSecret",
    "IdentitySettings",
    "LimitsSettings",
    "Pepper",
    "Section",
    "Settings",
    "TrainSettings",
    "UsageSettings",
    "WebhookSettings",
    "check_production",
    "load",
    "read_pepper",
    "read_signing_key",
    "read_webhook_keys",
    "rotate_pepper",
]
