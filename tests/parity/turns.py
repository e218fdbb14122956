"""Let two programs make their training steps in turns, so that whatever disturbs the machine disturbs both.

A machine that is shared, or virtual, can be a third slower from one minute to the next, which hides any
difference between two programs that run one after the other. Here both are loaded at once and each
makes a step while the other stands still. Standard library only: the reference program imports it too.
"""

from __future__ import annotations

import os
import socket
import time

__all__ = ["VARIABLE", "Umpire", "wait"]

VARIABLE = "LORA_KILN_TURNS"
"""Environment variable with the umpire's port and the program's name."""

_line: socket.socket | None = None


def wait() -> None:
    """In a program: a step is done; return when it is the next one's turn. Nothing where nobody asked."""
    global _line
    if VARIABLE not in os.environ:
        return
    if _line is None:
        port, name = os.environ[VARIABLE].split()
        _line = socket.create_connection(("127.0.0.1", int(port)))
        _line.sendall(name.encode().ljust(16))
    else:
        _line.sendall(b"x")
    _line.recv(1)


class Umpire:
    """Gives turns to two programs and notes what each one's steps took."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.settimeout(600)
        self._lines: dict[str, socket.socket] = {}

    def environment(self, name: str) -> dict[str, str]:
        """What a program needs in its environment to take part as ``name``."""
        return {VARIABLE: f"{self._server.getsockname()[1]} {name}"}

    def referee(self, names: list[str], steps: int) -> dict[str, list[float]]:
        """Let each of ``names`` make ``steps`` steps after its first one.

        Returns:
            Seconds of each step, by name. Both may run freely afterwards.

        Raises:
            OSError: A program did not come, or ended early.
        """
        while len(self._lines) < len(names):
            line, _ = self._server.accept()
            line.settimeout(600)
            self._lines[line.recv(16).decode().strip()] = line
        took: dict[str, list[float]] = {name: [] for name in names}
        for number in range(steps):
            for name in names if number % 2 else names[::-1]:
                began = time.perf_counter()
                self._lines[name].sendall(b"x")
                if not self._lines[name].recv(1):
                    raise OSError(f"{name} ended early")
                took[name].append(time.perf_counter() - began)
        for line in self._lines.values():
            line.close()
        self._server.close()
        return took
