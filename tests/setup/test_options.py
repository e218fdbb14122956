"""The flags of the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from app import options


def read(*argv: str) -> options.Options:
    return options.read(argv)(lambda: Path("usual"))


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        options.read(argv)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_defaults_serve_this_machine_alone() -> None:
    assert read() == options.Options(
        host="127.0.0.1",
        port=7860,
        listen=False,
        auth=None,
        roots={},
        state=Path("usual"),
        config=None,
        browser=True,
    )


def test_everything_given(tmp_path: Path) -> None:
    config, secret = tmp_path / "a.json", tmp_path / "secret"
    config.write_text("{}")
    secret.write_text("\ufeffkim:pass:word\n\n# a comment\nlee:other\n", encoding="utf-8")
    got = read(
        *("--listen", "--auth", f"@{secret}", "--port", "8000", "--state", str(tmp_path / "new")),
        *("--root", f"pictures={tmp_path}", "--root", f"more={tmp_path}/../{tmp_path.name}"),
        *("--config", str(config), "--no-browser"),
    )
    assert got == options.Options(
        host="0.0.0.0",
        port=8000,
        listen=True,
        auth=got.auth,
        roots={"pictures": tmp_path, "more": tmp_path},
        state=tmp_path / "new",
        config=config,
        browser=False,
    )
    assert got.auth is not None
    assert got.auth.verify("kim", "pass:word")
    assert got.auth.verify("lee", "other")
    assert not got.auth.verify("kim", "other")
    assert got.auth.admin == "kim"
    assert "pass:word" not in repr(got)
    assert "scrypt" not in repr(got)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "localhost", "::1", "LOCALHOST"])
def test_loopback_needs_no_password(host: str) -> None:
    assert read("--host", host).listen is False


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "studio.example", "localhost.example"])
def test_other_machines_need_a_password(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--auth" in refused(capsys, "--host", host)
    assert read("--host", host, "--auth", "kim:secret").listen is True


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--listen"], "--listen lets other machines in"),
        (["--listen", "--host", "::1", "--auth", "a:b"], "only one of the two"),
        (["--auth", "kim"], "USER:PASSWORD"),
        (["--auth", ":secret"], "USER:PASSWORD"),
        (["--auth", "kim:"], "USER:PASSWORD"),
        (["--auth", "@/no/such/file"], "cannot be read"),
        (["--port", "0"], '"0" is not a port'),
        (["--port", "65536"], '"65536" is not a port'),
        (["--port", "-1"], "--port"),
        (["--root", "pictures"], "NAME=PATH"),
        (["--root", "a/b=."], "NAME=PATH"),
        (["--root", "a=/no/such/folder"], "is not a folder"),
        (["--root", "a=.", "--root", "a=."], 'two --root are named "a"'),
        (["--state", __file__], "is not a folder"),
        (["--config", "no-such.json"], "there is no file"),
        (["--lis"], "unrecognized arguments"),
        (["stray"], "unrecognized arguments"),
    ],
)
def test_mistakes_are_one_sentence(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in refused(capsys, *argv)
