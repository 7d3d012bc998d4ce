"""The HTTP service."""

from typing import Literal

from pydantic import Field

from tuneloom.config.section import Section


class GatewaySettings(Section):
    host: str = Field("127.0.0.1", description="address that the API listens on")
    port: int = Field(8000, ge=0, le=65535, description="0: any free port")
    replicas: int = Field(1, ge=1, description="gateways, each a process")
    mode: Literal["compat", "throughput", "haproxy"] = Field(
        "compat",
        description="compat: Serve's defaults, but answers cross between replicas by gRPC; throughput: all of its "
        "fast path between processes; haproxy: that, and HAProxy in front, which listens on all interfaces and has no "
        "TLS",
    )
    max_ongoing_requests: int = Field(500, ge=1, description="requests that one gateway works on at once; others wait")
    cors_origins: tuple[str, ...] = Field(("*",), description="web pages that may call from a browser")
    max_body_bytes: int = Field(32 << 20, description="largest JSON body")
    max_file_bytes: int = Field(512 << 20, description="largest uploaded file")
    max_part_bytes: int = Field(64 << 20, description="largest part of an upload")
    max_upload_bytes: int = Field(8 << 30, description="largest file made of parts")
    # A second more for what is under way, and the time of a read: a revocation counts everywhere within five.
    key_cache_s: float = Field(2.0, ge=0, le=3, description="how long an answer about a key is remembered")
    stale_s: float = Field(
        300.0,
        ge=0,
        le=3600,
        description="how long keys and models that a gateway has read still count while the store does not answer",
    )
    store_wait_s: float = Field(
        1.5,
        gt=0,
        le=10,
        description="how long a request waits for the store before it goes on with what was read before",
    )
    request_timeout_s: float = Field(600.0, gt=0, description="longest that one answer may take, streamed or not")
