"""Who may use the page: users and their passwords, and what is refused before gradio sees it.

Standard library only: the flags are read before anything is installed.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

__all__ = ["ONCE", "Guard", "Limiter", "Users", "hashed", "is_loopback"]

ONCE = "once"
"""Name of the only user where the password is drawn by the program."""

SCRYPT = {"n": 2**14, "r": 8, "p": 1}
FAILURES, WINDOW_S = 5, 300.0
"""So many wrong logins from one address within so many seconds; then the address has to wait."""

SHUT = (
    "/gradio_api/proxy=",
    "/gradio_api/deep_link",
    "/gradio_api/run/",
    "/gradio_api/api/",
    "/gradio_api/call/",
    "/gradio_api/file/",
    "/gradio_api/stream/",
    "/gradio_api/dev/",
    "/gradio_api/process_recording",
    "/gradio_api/profiling",
    "/gradio_api/mcp",
    "/gradio_api/runs",
    "/monitoring",
)
"""Parts of gradio that the page does not use."""
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"SAMEORIGIN"),
    (b"referrer-policy", b"same-origin"),
)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def hashed(password: str, salt: bytes | None = None) -> str:
    """A password as a file of users may hold it: ``scrypt$salt$hash``, both in hexadecimal."""
    salt = salt or secrets.token_bytes(16)
    made = hashlib.scrypt(password.encode(), salt=salt, dklen=32, maxmem=64 << 20, **SCRYPT)
    return f"scrypt${salt.hex()}${made.hex()}"


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False  # a name may stand for any address


@dataclass
class Users:
    """Names and hashed passwords. The first user is the admin, who may stop everybody's runs."""

    secrets: dict[str, str] = field(repr=False)
    once: Callable[[str], None] | None = None
    """Told the new password whenever the one-time password was used up."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def parse(cls, text: str) -> Users:
        """Read ``USER:PASSWORD``, ``@FILE`` with a line for each user, or ``once``.

        Raises:
            ValueError: What is wrong, for a person.
        """
        if text == ONCE:
            return cls({ONCE: hashed(secrets.token_urlsafe())}, once=_tell)
        lines = [text]
        if text.startswith("@"):
            path = Path(text[1:]).expanduser()
            try:
                lines = path.read_text(encoding="utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(
                    f"{path} cannot be read: it needs a line USER:PASSWORD for each user"
                ) from error
        found: dict[str, str] = {}
        for line in lines:
            if not line.strip() or line.startswith("#"):
                continue
            user, colon, password = (
                line.strip().partition(":") if text.startswith("@") else line.partition(":")
            )
            if not (user and colon and password):
                raise ValueError("it must be USER:PASSWORD, neither of them empty, or @FILE, or once")
            if user in found:
                raise ValueError(f'the user "{user}" stands there twice')
            found[user] = password if _is_hash(password) else hashed(password)
        if not found:
            raise ValueError("no user stands there: give a line USER:PASSWORD for each")
        return cls(found)

    @property
    def admin(self) -> str:
        """Who may stop everybody's runs."""
        return next(iter(self.secrets))

    def renew(self) -> str:
        """Draw a new one-time password and return it."""
        password = secrets.token_urlsafe(9)
        self.secrets[ONCE] = hashed(password)
        return password

    def verify(self, user: str, password: str) -> bool:
        """Whether a login is right; takes as long for an unknown user as for a known one."""
        with self._lock:
            kept = self.secrets.get(user, "scrypt$00$00")
            salt = bytes.fromhex(kept.split("$")[1])
            right = hmac.compare_digest(hashed(password[:1000], salt), kept)
            if right and self.once is not None:
                self.once(self.renew())
            return right

    async def login(self, user: str, password: str) -> bool:
        """`verify` beside the event loop."""
        return await asyncio.to_thread(self.verify, user, password)


def _is_hash(text: str) -> bool:
    parts = text.split("$")
    return len(parts) == 3 and parts[0] == "scrypt" and all(len(part) in (32, 64) for part in parts[1:])


def _tell(password: str) -> None:
    print(f"The next login: user {ONCE}, password {password}", flush=True)  # noqa: T201 - meant for the console


@dataclass
class Limiter:
    """Counts what went wrong from each address."""

    clock: Callable[[], float] = time.monotonic
    _failed: dict[str, list[float]] = field(default_factory=dict)

    def wait_s(self, address: str) -> float:
        """Seconds until an address may try again; 0 if now."""
        now = self.clock()
        recent = [moment for moment in self._failed.get(address, []) if now - moment < WINDOW_S]
        self._failed[address] = recent
        return 0.0 if len(recent) < FAILURES else WINDOW_S - (now - recent[-FAILURES])

    def failed(self, address: str) -> None:
        """Count one more."""
        if len(self._failed) > 10_000:  # addresses cost an attacker with IPv6 nothing
            self._failed.clear()
        self._failed.setdefault(address, []).append(self.clock())

    def passed(self, address: str) -> None:
        """Forget an address."""
        self._failed.pop(address, None)


class Guard:
    """ASGI middleware around gradio: what it refuses never reaches a handler.

    Args:
        app: What is guarded.
        may_serve: Whether a file may be given out, by its path.
        loopback: Whether the page is for this machine alone; then a foreign ``Host`` is a rebound
            name, by which a web page somewhere else would reach it.
        limiter: Of wrong logins.
    """

    def __init__(
        self, app: Any, *, may_serve: Callable[[str], bool], loopback: bool, limiter: Limiter | None = None
    ) -> None:
        self.app, self.may_serve, self.loopback = app, may_serve, loopback
        self.limiter = limiter or Limiter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        path = unquote(str(scope["path"]))
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        if refusal := self._refusal(str(scope["method"]), path, headers):
            await _answer(send, *refusal)
            return
        address = (scope.get("client") or ("?",))[0]
        is_login = scope["method"] == "POST" and path.rstrip("/") == "/login"
        if is_login and (wait_s := self.limiter.wait_s(address)):
            await _answer(send, 429, f"Too many wrong logins: try again in {wait_s / 60:.0f} minutes.")
            return

        async def watched(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                if is_login and message["status"] == 200:
                    self.limiter.passed(address)
                elif is_login:
                    self.limiter.failed(address)
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        await self.app(scope, receive, watched)

    def _refusal(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if self.loopback and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            return 403, "This page is served to its own machine alone, as 127.0.0.1 or localhost."
        origin = headers.get("origin", "")
        if method not in ("GET", "HEAD", "OPTIONS") and origin:
            hosts = {host, headers.get("x-forwarded-host", host)}
            if urlsplit(origin).netloc not in hosts:
                return 403, "The request comes from another site."
        if path.startswith(SHUT):
            return 404, "There is nothing here."
        if "/file=" in path and not self.may_serve(path.split("/file=", 1)[1]):
            return 403, "This file is not given out."
        return None


async def _answer(send: Send, status: int, text: str) -> None:
    body = json.dumps({"detail": text}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
