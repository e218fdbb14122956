"""Whatever a file holds, loading ends in a configuration and a report, or in one sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.config.eras import BY_KEY, written_on
from trainer.config import KohyaConfig, dumps, lay_over, loads, with_values
from trainer.config.legacy import REMOVED, RENAMED, RENAMED_FOR_FAMILY
from trainer.errors import ConfigError

calm = settings(
    deadline=None,
    database=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

OLD_KEYS = [*RENAMED, *REMOVED, *RENAMED_FOR_FAMILY, "use_wandb", "use_8bit_adam", "locon", "save_as_bool"]
TEXTS = st.one_of(
    st.text(max_size=20),
    st.text(alphabet=st.characters(), max_size=5),  # lone halves of surrogate pairs too
    st.sampled_from(
        ["", " ", "1", "1.5", "-3", "1e400", "nan", "inf", "True", "false", "None", "LoCon", "9" * 30]
    ),
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=-(2**70), max_value=2**70),
    st.floats(allow_nan=True, allow_infinity=True),
    TEXTS,
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
OBJECTS = st.dictionaries(
    st.one_of(st.sampled_from(sorted(BY_KEY)), st.sampled_from(OLD_KEYS), TEXTS), VALUES, max_size=12
)


def check(text: str) -> None:
    first = loads(text)
    for name in KohyaConfig.model_fields:
        setting, value = KohyaConfig.setting(name), getattr(first.config, name)
        types: dict[str, tuple[type, ...]] = {
            "boolean": (bool,),
            "integer": (int,),
            "number": (int, float),
            "string": (str,),
        }
        assert type(value) in types[setting.kind]
        assert not isinstance(value, float) or (
            math.isfinite(value) and not (value.is_integer() and abs(value) < 2**53)
        )
    written = dumps(first.config)
    second = loads(written)
    assert {name: getattr(second.config, name) for name in KohyaConfig.model_fields} == {
        name: getattr(first.config, name) for name in KohyaConfig.model_fields
    }
    assert dumps(second.config) == written
    assert not second.of("converted", "missing", "invalid")
    for finding in first.report:
        assert finding.message.encode("utf-8")
        assert "\n" not in finding.message
        assert finding.message == finding.message.strip()


@calm
@given(OBJECTS)
def test_any_object_loads_and_survives_a_save(raw: dict[str, Any]) -> None:
    check(json.dumps(raw))


@calm
@given(OBJECTS, st.sampled_from(["2022-12-31", "2023-06-15", "2024-01-15", "2026-07-10"]))
def test_any_change_to_a_file_of_kohyas(raw: dict[str, Any], day: str) -> None:
    check(json.dumps(written_on(day) | raw, ensure_ascii=True))


@calm
@given(OBJECTS)
def test_nothing_that_a_file_says_is_lost_silently(raw: dict[str, Any]) -> None:
    loaded = loads(json.dumps(raw))
    kept = loaded.config.model_extra or {}
    told = {finding.key for finding in loaded.report}
    for key, value in json.loads(json.dumps(raw)).items():
        if key in BY_KEY:
            written = getattr(loaded.config, key)
            same = (
                json.dumps(written) == json.dumps(value)
                or written == value
                or (value is None and written == "")
            )
            assert same or key in told
        else:
            clean = key.encode("utf-8", "replace").decode("utf-8")
            assert key in told or json.dumps(kept[clean]) == json.dumps(value)


def refusal(call: Callable[[], object]) -> str:
    """The sentence that a call ends in, "" if it ends well."""
    try:
        call()
    except ConfigError as error:
        return str(error)
    return ""


@calm
@given(st.one_of(st.binary(max_size=200), st.text(max_size=200)))
def test_any_bytes_end_in_a_config_or_one_sentence(source: bytes | str) -> None:
    assert "\n" not in refusal(lambda: loads(source))


@calm
@given(st.text(alphabet='{}[]",:/*\\ \n\t0123456789.eE+-truefalsnNaI', max_size=120))
def test_any_text_that_looks_like_json(source: str) -> None:
    assert "\n" not in refusal(lambda: check(source))


@calm
@given(OBJECTS)
def test_a_preset_over_a_page_never_raises(raw: dict[str, Any]) -> None:
    page = KohyaConfig(train_data_dir="/data", epoch=4)
    laid = lay_over(raw, page).config
    assert laid.train_data_dir == "/data"
    assert loads(dumps(laid)).config.model_dump(include=set(BY_KEY)) == laid.model_dump(include=set(BY_KEY))


@calm
@given(st.sampled_from(sorted(BY_KEY)), TEXTS)
def test_any_text_for_any_setting(name: str, text: str) -> None:
    page = KohyaConfig()
    message = refusal(lambda: with_values(page, {name: text}))
    if message:
        assert name in message
    else:
        check(dumps(with_values(page, {name: text})))
