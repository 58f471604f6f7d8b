"""Which names and addresses mean this machine, and which requests come from another site's page in its browser.

A server without keys trusts whoever is on this machine. Its browser is on this machine too, and lets any web page send
requests here: to our address, from its own origin; or, once its own name resolves to our address, under its own name.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from heddle_server.api.errors import ForbiddenOrigin

# Programs that are built like browsers show pages of their own under a scheme that they register with the system. No
# web site's page, and none that was saved from one, can have such an origin.
PROGRAM_SCHEMES = frozenset({"app", "tauri", "vscode-file"})


def is_loopback(host: str) -> bool:
    """Whether a host name or address, without port, means this machine and cannot be made to mean another."""
    name = host.lower().removesuffix(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def check_local(headers: Headers) -> None:
    """Raises `ForbiddenOrigin` for what a page of another site may have sent."""
    host, origin = headers.get("host"), headers.get("origin")
    if host is not None and not is_loopback(_hostname(host)):
        raise ForbiddenOrigin(
            "This server has no API keys and answers to this machine's own name and address only, such as localhost. "
            "Make a key with `heddle keys create`, or start it with --allow-anonymous."
        )
    if origin is not None and not _is_own(origin.lower(), host) and not _is_programs(origin.lower()):
        raise ForbiddenOrigin(
            "This server has no API keys and takes no requests from the pages of other sites. Make a key with "
            "`heddle keys create`, or start it with --allow-anonymous."
        )


def _is_own(origin: str, host: str | None) -> bool:
    return host is not None and origin in (f"http://{host.lower()}", f"https://{host.lower()}")


def _is_programs(origin: str) -> bool:
    scheme, separator, _ = origin.partition("://")
    return bool(separator) and scheme in PROGRAM_SCHEMES


def _hostname(host: str) -> str:
    """A Host header without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
