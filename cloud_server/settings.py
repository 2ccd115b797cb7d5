"""What a server is started with: the flags of ``cloud-server serve``."""

from __future__ import annotations

from dataclasses import dataclass

from shared.errors import BadInput
from shared.options import option
from shared.profiles import DEFAULT_PROFILE, Dtype
from shared.wire import GRPC_PORT, HTTP_PORT


@dataclass(frozen=True)
class ServerSettings:
    """The fields' docs are the flags' help."""

    profile: str = option("what fits together: codec, neck, CLIP and backends", DEFAULT_PROFILE)
    host: str = option("address to listen on; 0.0.0.0 is every one of this machine", "127.0.0.1")
    grpc_port: int = option("port for gRPC; 0 takes a free one", GRPC_PORT)
    http_port: int = option("port for REST; 0 takes a free one", HTTP_PORT)
    max_request_bytes: int = option("largest request; one photo and its question take about 1,000 bytes", 65536)
    max_images: int = option("most photos in one request", 8)
    max_tokens: int = option("most tokens that a request may ask for", 256)
    cache_photos: int = option("photos of which it is kept what CLIP has seen, for further questions; 2 MB each", 64)
    threads: int = option("CPU threads of the models; 0 takes all", 0)
    dtype: Dtype = option("that language models compute in; auto is as the profile says, or by the device", "auto")
    device: str = option("where the models run, as PyTorch names it: cpu, cuda, cuda:1", "cpu")

    def __post_init__(self) -> None:
        for name in ("grpc_port", "http_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise BadInput(f"{name} is {getattr(self, name)}; a port is between 0 and 65535")
        for name in ("max_request_bytes", "max_images", "max_tokens"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("cache_photos", "threads"):
            if getattr(self, name) < 0:
                raise BadInput(f"{name} is {getattr(self, name)}; it must be 0 or more")
