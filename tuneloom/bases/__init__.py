"""Base checkpoints: what there is (`catalogue`) and how one comes in (`intake`). No torch, no Ray."""

from tuneloom.bases.catalogue import Base, catalogue, get_base, linear_shapes, slug
from tuneloom.bases.intake import add_folder, add_gguf, fetch_default, remove, verify

__all__ = [
    "Base",
    "add_folder",
    "add_gguf",
    "catalogue",
    "fetch_default",
    "get_base",
    "linear_shapes",
    "remove",
    "slug",
    "verify",
]
