"""What `heron serve` is started with: where it listens, who may ask, and how much a request may want."""

from __future__ import annotations

import dataclasses
import ipaddress
import re

from heron.config.finetune import RWKV_TEMPLATE, check_template
from heron.config.settings import check_types, setting
from heron.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")  # of a model, a variant of it, or a saved state
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\sA-Z*]+")  # as browsers send it


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """The settings of a server.

    Raises:
        ConfigError: a value of another type or out of range, or an address that others can reach without a key.
    """

    host: str = setting("127.0.0.1", "address to listen on; any but this machine's own needs a key")
    port: int = setting(8000, "port to listen on; 0: a free one")
    name: str | None = setting(None, "what /v1/models calls the model; None: the name of its file or folder")
    rows: int = setting(64, "texts that are written side by side, for each model")
    api_key: str | None = setting(None, "what clients must send as their key; None: none is needed")
    api_key_file: str | None = setting(None, "read the key from a file, so that no list of processes shows it")
    cors: str | None = setting(None, "web pages that may ask, as in https://a.org,https://b.org; None: none")
    template: str = setting(RWKV_TEMPLATE, "chat template: rwkv or a FILE.jinja")
    state_dir: str | None = setting(None, "folder that keeps saved states; None: they are lost at the end")
    cache_device: int = setting(1024, "MiB of states of prompts that are kept where the model runs; 0: none")
    cache_host: int = setting(4096, "MiB of them in host memory; as much of sessions, and of saved states; 0: none")
    cache_disk: int = setting(4096, "MiB of them in files in --state_dir, also for the next start; 0: none")
    queue: int = setting(256, "requests that may wait for a place; one more is answered 429")
    max_body: int = setting(1 << 20, "most bytes of a request's body")
    max_prompt: int = setting(131_072, "most tokens of a prompt")
    max_answer: int = setting(32_768, "most tokens of an answer")
    timeout: float = setting(600.0, "seconds after which a request is ended")
    grace: float = setting(30.0, "seconds that running requests have to end when the server is stopped")

    def __post_init__(self):
        check_types(self)
        may_be_zero = ("port", "cache_device", "cache_host", "cache_disk", "queue")
        for name in (*may_be_zero, "rows", "max_prompt", "max_answer", "max_body"):
            if getattr(self, name) < (lowest := int(name not in may_be_zero)):
                raise ConfigError(f"{name}: wanted at least {lowest}, got {getattr(self, name)}")
        if self.port > 65535:
            raise ConfigError(f"port: wanted at most 65535, got {self.port}")
        if not self.timeout > 0:
            raise ConfigError(f"timeout: wanted more than 0 seconds, got {self.timeout:g}")
        if not self.grace >= 0:
            raise ConfigError(f"grace: wanted at least 0 seconds, got {self.grace:g}")
        if self.name is not None and not NAME.fullmatch(self.name):
            raise ConfigError(f"name: wanted letters, digits, '.', '_' and '-', at most 64, got {self.name!r:.80}")
        check_template("template", self.template)
        if self.api_key is not None and self.api_key_file is not None:
            raise ConfigError("api_key and api_key_file were both given; drop one")
        if self.api_key is not None:
            check_key(self.api_key)
        for origin in self.origins:
            if not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    "cors: wanted origins as browsers send them, such as https://a.org,http://b.org:8080, lower case, "
                    f"without a path or a slash behind, got {origin!r:.80}"
                )
        if not self.is_local and self.api_key is None and self.api_key_file is None:
            raise ConfigError(
                f"host {self.host}: others can reach this address, so it needs a key: add --api_key_file FILE, or "
                "listen on 127.0.0.1"
            )

    @property
    def is_local(self) -> bool:
        """Whether this machine alone can reach the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name, which may stand for any address
            return False

    @property
    def origins(self) -> list[str]:
        """The web pages that may ask."""
        return [origin.strip() for origin in (self.cors or "").split(",") if origin.strip()]


def check_key(key: str) -> None:
    """ConfigError for a key that is no word of printable ASCII, which headers could not carry."""
    if not re.fullmatch(r"[!-~]{1,200}", key):
        raise ConfigError("api_key: wanted 1 to 200 printable ASCII characters without a space")
