"""Settings of `tinylm serve`: which models, where, for whom, and the limits that keep its memory and time bounded."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass, fields

from tinylm.checkpoint.model_path import named_paths
from tinylm.generation.sampling import accept
from tinylm.generation.scheduler import SchedulerSettings
from tinylm.system.runtime import InferenceDtypeName

API_KEY_VARIABLE = "TINYLM_API_KEY"


@dataclass(frozen=True, kw_only=True)
class ServeSettings(SchedulerSettings):
    """Settings of serving."""

    model_path: str = ""
    """model folder, adapter folder, .gguf or .pth file; several as name=path,name2=path2; without it the model that
    `tinylm chat` would take"""
    adapter: str = ""
    """LoRA adapters, as name=path,name2=path2, each beside the model that it was trained on; a request chooses one by
    `model`"""
    runs_dir: str = ""
    """folder whose training runs the page shows, also while they run; by default that of the model"""
    tokenizer_path: str = ""
    """tokenizer folder; by default the model's own"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps"""
    dtype: InferenceDtypeName = "auto"
    """precision of matrix products; auto is bfloat16 where the hardware has it, else float32; int8 stores
    weights in 8 bits, for a CPU"""
    host: str = "127.0.0.1"
    """address to listen at; 0.0.0.0 lets other machines in: set an API key then"""
    port: int = 8000
    """port to listen at; 0 takes a free one"""
    api_key: str = ""
    """clients must send this as a bearer token; better in the environment as TINYLM_API_KEY, where `ps` hides it"""
    allowed_hosts: str = ""
    """names by which clients may call this server, besides localhost and IP addresses; with commas, * for all"""
    cors_origins: str = ""
    """web pages that may use the server, such as http://localhost:3000; with commas, * for all"""
    max_body_bytes: int = 4 * 2**20
    """largest body of a request (bytes)"""
    max_answers: int = 64
    """most answers to one request: its prompts times n"""
    max_stops: int = 16
    """most stop strings of a request"""
    max_messages: int = 1024
    """most messages of a conversation"""
    max_connections: int = 512
    """most connections at a time; more get status 503, and none beyond twice as many"""
    receive_timeout: float = 10.0
    """longest wait for a request's head or body (seconds)"""
    request_timeout: float = 300.0
    """longest time for an answer, with its wait for a place (seconds)"""
    drain_timeout: float = 30.0
    """longest time for open answers after SIGTERM (seconds)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        accept("port", self.port, 0 <= self.port < 2**16, "0 (a free one) to 65535")
        for name in ("max_body_bytes", "max_answers", "max_stops", "max_messages", "max_connections"):
            accept(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("receive_timeout", "request_timeout", "drain_timeout"):
            accept(name, getattr(self, name), 0 < getattr(self, name) < float("inf"), "above 0 seconds")
        if self.key and not (self.key.isascii() and self.key.isprintable() and " " not in self.key):
            raise ValueError("the API key has blanks or other than ASCII characters, which a header cannot carry")
        named_paths(self.model_path), named_paths(self.adapter)
        for origin in listed(self.cors_origins):
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ValueError(f"cors_origins has {origin}; expected * or an origin such as http://localhost:3000")

    @property
    def scheduling(self) -> SchedulerSettings:
        """The part that a scheduler reads."""
        return SchedulerSettings(**{field.name: getattr(self, field.name) for field in fields(SchedulerSettings)})

    @property
    def key(self) -> str:
        """The API key, from the flag or the environment; empty for none."""
        return self.api_key or os.environ.get(API_KEY_VARIABLE, "")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def listed(text: str) -> list[str]:
    """The parts of `a, b`, in lower case: hosts, or origins without a last slash."""
    return [part.strip().lower().rstrip("/") for part in text.split(",") if part.strip()]
