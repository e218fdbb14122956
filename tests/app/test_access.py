"""Passwords, the one-time password, and how often somebody may guess."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from app.access import FAILURES, ONCE, WINDOW_S, Limiter, Users, hashed


def test_a_file_of_users_may_hold_hashes(tmp_path: Path) -> None:
    file = tmp_path / "users"
    file.write_text(f"# who may log in\nkim:{hashed('pa:ss')}\nlee:plain\n")
    users = Users.parse(f"@{file}")
    assert users.admin == "kim"
    assert users.verify("kim", "pa:ss")
    assert users.verify("lee", "plain")
    for user, password in (
        ("kim", "plain"),
        ("kim", hashed("pa:ss")),
        ("max", "plain"),
        ("lee", ""),
        ("", ""),
    ):
        assert not users.verify(user, password)
    assert hashed("a") != hashed("a")
    assert asyncio.run(users.login("lee", "plain"))


@pytest.mark.parametrize("text", ["kim:a\nkim:b", "kim", "", "# nobody"])
def test_mistakes_in_a_file_of_users(tmp_path: Path, text: str) -> None:
    file = tmp_path / "users"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"twice|USER:PASSWORD|no user"):
        Users.parse(f"@{file}")


def test_a_one_time_password_is_good_once(capsys: pytest.CaptureFixture[str]) -> None:
    users = Users.parse(ONCE)
    password = users.renew()
    assert len(password) >= 12
    assert not users.verify(ONCE, "guess")
    assert users.verify(ONCE, password)
    assert not users.verify(ONCE, password)
    following = capsys.readouterr().out.split()[-1]
    assert users.verify(ONCE, following)


def test_who_guesses_has_to_wait() -> None:
    now = [0.0]
    limiter = Limiter(clock=lambda: now[0])
    for _ in range(FAILURES):
        assert limiter.wait_s("a") == 0
        limiter.failed("a")
    assert limiter.wait_s("a") == WINDOW_S
    assert limiter.wait_s("b") == 0
    now[0] = WINDOW_S / 2
    assert limiter.wait_s("a") == WINDOW_S / 2
    now[0] = WINDOW_S + 1
    assert limiter.wait_s("a") == 0
    limiter.failed("a")
    limiter.passed("a")
    assert limiter.wait_s("a") == 0
