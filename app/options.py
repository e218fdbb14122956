"""The flags of ``python -m app``, read before anything is installed: standard library only."""

from __future__ import annotations

import argparse
import dataclasses
import getpass
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from app.access import Users, hashed, is_loopback

__all__ = ["Options", "read"]

DEFAULT_PORT = 7860  # Kohya's, and Gradio's


@dataclasses.dataclass(frozen=True)
class Options:
    """How the page is served.

    Attributes:
        host: Address or name that the server binds to.
        port: TCP port, 1 to 65535.
        listen: Whether other machines can reach the page; then `auth` is set.
        auth: Who may log in, or None where everybody on this machine may use the page.
        roots: Folders that the page may read and write, by the name it shows for them; resolved.
        state: Folder for what the program remembers between starts.
        config: Kohya JSON to show at the start.
        browser: Whether to open a browser.
    """

    host: str
    port: int
    listen: bool
    auth: Users | None = dataclasses.field(repr=False)
    roots: dict[str, Path]
    state: Path
    config: Path | None
    browser: bool


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"LoRA Kiln: {message} (`python -m app --help` shows all flags).\n")


def read(argv: Sequence[str]) -> Callable[[Callable[[], Path]], Options]:
    """Check the flags, which needs nothing installed; ``--help`` and mistakes end the program here.

    Args:
        argv: Arguments without the program's name.

    Returns:
        A function that makes the `Options`; it takes one that names the usual state folder, for which
        a library is asked.
    """
    parser = _parser()
    given = parser.parse_args(argv)
    if given.listen and given.host is not None:
        parser.error("--listen means all addresses and --host one of them: give only one of the two")
    host = "0.0.0.0" if given.listen else given.host or "127.0.0.1"
    reachable = not is_loopback(host)
    if reachable and given.auth is None:
        parser.error(
            f"{'--listen' if given.listen else f'--host {host}'} lets other machines in, so it needs "
            "--auth USER:PASSWORD, --auth @FILE or --auth once"
        )
    roots: dict[str, Path] = {}
    for name, folder in given.root:
        if name in roots:
            parser.error(f'two --root are named "{name}": give each its own name')
        roots[name] = folder

    def complete(usual_state: Callable[[], Path]) -> Options:
        return Options(
            host=host,
            port=given.port,
            listen=reachable,
            auth=given.auth,
            roots=roots,
            state=given.state or usual_state(),
            config=given.config,
            browser=given.browser,
        )

    return complete


class _Hash(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *rest: object) -> NoReturn:
        password = getpass.getpass("Password: ")
        if not password or password != getpass.getpass("Again: "):
            parser.error("the passwords are empty or differ")
        sys.stdout.write(f"{hashed(password)}\n")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m app",
        description="Serve the page of LoRA Kiln. The first start installs what is needed into .venv.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--host", help="address to serve on (default: 127.0.0.1, this machine alone)")
    add("--port", type=_port, default=DEFAULT_PORT, help=f"port to serve on (default: {DEFAULT_PORT})")
    add("--listen", action="store_true", help="serve on all addresses, so that other machines can connect")
    add(
        "--auth",
        type=_auth,
        metavar="USER:PASSWORD|@FILE|once",
        help="who may log in; needed if other machines can connect. @FILE has a line USER:PASSWORD for each user, "
        "the first of whom is the admin; it keeps passwords out of the list of processes, and a line may hold the "
        "hash that --hash prints in the place of the password. With once, a password for one login is drawn and "
        "printed",
    )
    add(
        "--hash",
        action=_Hash,
        nargs=0,
        help="ask for a password, print its hash for a file of users, and end",
    )
    add(
        "--root",
        type=_root,
        metavar="NAME=PATH",
        action="append",
        default=[],
        help="a folder that the page may use, and the name to show for it; may be given several times",
    )
    add("--state", type=_state, metavar="DIR", help="folder for what is remembered between starts")
    add("--config", type=_config, metavar="FILE", help="Kohya JSON to open")
    add("--no-browser", action="store_false", dest="browser", help="do not open a browser")
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f'"{text}" is not a port: give a number from 1 to 65535')
    return int(text)


def _auth(text: str) -> Users:
    try:
        return Users.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _root(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder) or any(letter in name for letter in r"/\:"):
        raise argparse.ArgumentTypeError(f'"{text}" is not NAME=PATH, with a name free of / \\ and :')
    path = Path(folder).expanduser().resolve()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is not a folder")
    return name, path


def _state(text: str) -> Path:
    path = Path(text).expanduser().resolve()
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is not a folder")
    return path


def _config(text: str) -> Path:
    path = Path(text).expanduser().resolve()
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {path}")
    return path
