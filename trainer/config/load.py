"""Kohya's JSON in: every file that Kohya's page ever wrote, and what people made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config._convert import convert, switch
from trainer.config._secrets import without_secrets
from trainer.config._text import MAX_BYTES, parse_object
from trainer.config.kiln import KilnFields
from trainer.config.kohya import KohyaConfig
from trainer.config.legacy import (
    ALPHA_SINCE,
    DREAMBOOTH_KEYS,
    FINETUNE_KEYS,
    LATER_ADDED,
    LORA_KEYS,
    MISSING_MEANT,
    REMOVED,
    RENAMED,
    RENAMED_FOR_FAMILY,
    TEXTUAL_INVERSION_KEYS,
    TOLERATED,
)
from trainer.config.report import FileKind, Finding, FindingKind, Loaded, shown
from trainer.errors import ConfigError

__all__ = ["lay_over", "load", "loads"]

Source = str | bytes | Mapping[str, Any]

HIDDEN = "(hidden)"
"""Stands in a report for a token."""

FAMILY_SWITCHES = {
    "sd3_checkbox": "sd3",
    "flux1_checkbox": "flux1",
    "hunyuan_image_checkbox": "hunyuan",
    "anima_checkbox": "anima",
    "lumina_checkbox": "lumina",
    "sdxl": "sdxl",
}
"""Settings that choose a family other than SD 1.x and 2.x."""

NOT_OF_AN_AGE = LATER_ADDED | KilnFields.model_fields.keys()
"""Settings that do not tell when Kohya wrote a file."""

WHOLE_FILE_KEYS = 20
"""A file with fewer known keys is a fragment that somebody wrote by hand."""


def load(path: Path | str) -> Loaded:
    """Read a configuration file.

    Loading starts clean: what the file lacks is read as Kohya read it when the file was written.

    Raises:
        ConfigError: The file cannot be read, is too large, or is no JSON object.
    """
    path = Path(path)
    return _load(_read(path), str(path), path)


def loads(source: Source) -> Loaded:
    """Read a configuration from JSON text, its bytes, or an object that is already parsed.

    Raises:
        ConfigError: It is too large or no JSON object.
    """
    return _load(source, "the configuration", None)


def lay_over(preset: Path | Source, config: KohyaConfig, *, keep_paths: bool = True) -> Loaded:
    """Lay a preset over the settings on the page, as Kohya does with its presets.

    Only keys that the preset has change anything; keys that are null, or that cannot be read,
    leave the setting as it is.

    Args:
        preset: A file, or JSON as for `loads`.
        config: What is on the page.
        keep_paths: Whether models, files, folders and the output's name stay as they are on the
            page; those that the page has not filled in are taken from the preset either way.

    Raises:
        ConfigError: The preset cannot be read.
    """
    read = _Reader(*_parse(preset), fallback=config)
    values = {name: value for name, value in read.values.items() if value is not None}
    if keep_paths:
        values = {name: value for name, value in values.items() if not _is_filled_path(config, name)}
    merged = config.model_dump() | read.extras | values
    laid = KohyaConfig.model_validate(merged)
    return Loaded(
        laid, (*read.report, *_remarks(laid)), read.kind, preset if isinstance(preset, Path) else None
    )


def _load(source: Source, name: str, path: Path | None) -> Loaded:
    read = _Reader(*_parse(source, name), fallback=None)
    values, report = dict(read.values), list(read.report)
    report += _missing(values, read)
    present = {name: value for name, value in values.items() if value is not None}
    config = KohyaConfig.model_validate({**read.extras, **present})
    return Loaded(config, (*report, *_remarks(config)), read.kind, path)


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(
                f"{path} is too large for a configuration ({path.stat().st_size:,} bytes, at most "
                f"{MAX_BYTES:,}): choose the JSON that Kohya saved"
            )
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file {path}: check the path") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path} is a folder: choose a JSON file in it") from error
    except (OSError, ValueError) as error:
        if path.is_dir():  # Windows reports a folder as a missing permission
            raise ConfigError(f"{path} is a folder: choose a JSON file in it") from error
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{path} cannot be read ({reason}): check the path and its permissions") from error


def _parse(source: Path | Source, name: str = "the preset") -> tuple[dict[str, Any], list[Finding]]:
    if isinstance(source, Path):
        name, source = str(source), _read(source)
    if isinstance(source, Mapping):
        try:
            source = json.dumps(dict(source))
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"{name} holds something that JSON cannot: {error}") from error
    raw, repeated, notes = parse_object(source, name)
    report = [Finding("converted", "", None, None, f"the file is not plain JSON: {note}") for note in notes]
    report += [
        Finding(
            "converted", key, None, raw[key], f"{shown(key)} stands in the file twice; the last value counts"
        )
        for key in repeated
    ]
    return raw, report


class _Reader:
    """Sorts the keys of one file into settings and others, and converts the values.

    Attributes:
        values: Converted values of the settings in the file; None for those that are null.
        extras: Keys that are no settings.
        report: What was found.
        age: Day on which the youngest key appeared in Kohya, "" if no key is known.
        kind: Which tab wrote the file.
    """

    def __init__(self, raw: dict[str, Any], report: list[Finding], *, fallback: KohyaConfig | None) -> None:
        self.report = report
        self.extras: dict[str, Any] = {}
        self.kind = _kind_of(raw)
        known = [key for key in raw if key in KohyaConfig.model_fields]
        self.age = max(
            (KohyaConfig.setting(key).ui.since for key in known if key not in NOT_OF_AN_AGE), default=""
        )
        self._name_kind(raw, known)
        written = {key: raw[key] for key in known}
        for key, value in raw.items():
            if key not in written:
                self._other_key(key, value, raw, written)
        self.values = {key: self._value(key, value, fallback) for key, value in written.items()}

    def _say(self, kind: FindingKind, key: str, found: Any, used: Any, message: str) -> None:
        self.report.append(Finding(kind, key, found, used, message))

    def _name_kind(self, raw: dict[str, Any], known: list[str]) -> None:
        if self.kind == "other":
            self._say(
                "unsupported", "", None, None, f"none of its {len(raw)} keys is a setting of Kohya's LoRA tab"
            )
        elif self.kind != "LoRA":
            self._say(
                "unsupported",
                "",
                None,
                None,
                f"this is a {self.kind} file, not one of the LoRA tab: {len(known)} settings that both know were "
                "taken; check the rank, the learning rates and the folders before you train",
            )

    def _other_key(self, key: str, value: Any, raw: dict[str, Any], written: dict[str, Any]) -> None:
        if key in RENAMED:
            self._rename(key, RENAMED[key], value, written)
        elif key in RENAMED_FOR_FAMILY and _is_on(raw.get(RENAMED_FOR_FAMILY[key][1])):
            self._rename(key, RENAMED_FOR_FAMILY[key][0], value, written)
        elif key in ("use_wandb", "use_wandb_checkbox"):
            on = _is_on(value)
            if on and not written.get("log_with"):
                written["log_with"] = "wandb"
            used = written.get("log_with")
            self._say("converted", key, value, used, f"{key} is called log_with today: {shown(used or '')}")
        elif key == "use_8bit_adam":
            chosen = "AdamW8bit" if _is_on(value) else "AdamW"
            if written.get("optimizer") is None:
                written["optimizer"] = chosen
            used = written["optimizer"]
            self._say("converted", key, value, used, f"{key} is replaced by optimizer: {shown(used)}")
        elif key == "locon":
            if _is_on(value) and written.get("LoRA_type") in (None, "", "Standard"):
                written["LoRA_type"] = "LyCORIS/LoCon"
            used = written.get("LoRA_type", "Standard")
            self._say("converted", key, value, used, f"{key} is replaced by LoRA_type: {shown(used)}")
        else:
            self._keep(key, value)

    def _rename(self, key: str, name: str, value: Any, written: dict[str, Any]) -> None:
        current = written.get(name)
        if current is None or current == "":
            written[name] = value
            text = HIDDEN if KohyaConfig.setting(name).ui.secret else shown(value)
            self._say("converted", key, value, value, f"{key} is called {name} today: {text} was taken")
        else:
            message = f"{key} is called {name} today, which is there as well and counts: {shown(current)}"
            self._say("converted", key, value, current, message)
        if KohyaConfig.setting(name).ui.secret:
            self.report[-1] = Finding("converted", key, HIDDEN, "", f"{key} is called {name} today")

    def _keep(self, key: str, value: Any) -> None:
        valid = key.encode("utf-8", "replace").decode("utf-8")
        name = valid if valid.isidentifier() and len(valid) <= 80 else shown(valid)
        self.extras[valid] = value
        if valid != key:
            self._say("converted", valid, None, value, f"{name}: half of a character in the key was replaced")
        if key in REMOVED or key in RENAMED_FOR_FAMILY:
            why = REMOVED.get(key, "is an option of another family or of whole models")
            self._say("unsupported", key, value, None, f"{name} {why}; it has no effect and is kept")
        elif key not in TOLERATED:
            self._say("unknown", valid, value, value, f"{name} is not known; it has no effect and is kept")

    def _value(self, key: str, value: Any, fallback: KohyaConfig | None) -> Any:
        setting = KohyaConfig.setting(key)
        if value is None:
            return "" if setting.kind == "string" and setting.default == "" and fallback is None else None
        found = HIDDEN if setting.ui.secret else value
        try:
            used, note = convert(setting, value)
        except ValueError as error:
            used = setting.default if fallback is None else getattr(fallback, key)
            text = f"{key} cannot be {shown(found)}: {error}; {shown(used)} is used"
            self._say("invalid", key, found, used, text)
            return used
        if note and not used and setting.ui.secret:
            self._say("converted", key, found, used, f"{key} was empty in another way")
        elif note and not setting.ui.secret:
            self._say("converted", key, value, used, f"{key}: {shown(value)} became {shown(used)} ({note})")
        if isinstance(used, str) and without_secrets(key, used) != used:
            used = without_secrets(key, used)
            text = f"{key} holds a token, which was left out: tokens are never read from or kept in a file"
            self._say("unsupported", key, HIDDEN, used, text)
        return used


def _missing(values: dict[str, Any], read: _Reader) -> list[Finding]:
    """Fill in what the file lacks where Kohya read that as something else than today's default."""
    report: list[Finding] = []

    def fill(name: str, value: Any, why: str) -> None:
        null = name in values
        values[name] = value
        state = "is null" if null else "is missing"
        report.append(Finding("missing", name, None, value, f"{name} {state}: {shown(value)} is used, {why}"))

    if values.get("optimizer") is None:
        fill("optimizer", "AdamW", "as Kohya does")
    if values.get("network_alpha") is None and read.age and read.age < ALPHA_SINCE:
        rank = values.get("network_dim")
        fill(
            "network_alpha",
            KohyaConfig.setting("network_dim").default if rank is None else rank,
            "the rank, since the file is older than alpha",
        )
    for name, (until, value) in MISSING_MEANT.items():
        if values.get(name) is None and read.age and read.age < until:
            fill(name, value, f"as before {until}")
    for name, value in values.items():
        if value is None:
            used = KohyaConfig.setting(name).default
            text = f"{name} is null: the default, {shown(used)}, is used"
            report.append(Finding("missing", name, None, used, text))
    absent = len(KohyaConfig.model_fields.keys() - values.keys() - KilnFields.model_fields.keys())
    if absent:
        text = f"{absent} settings are not in the file and have their defaults"
        report.append(Finding("missing", "", None, None, text))
    return report


def _remarks(config: KohyaConfig) -> list[Finding]:
    """Values outside what Kohya's page allows, and values that do nothing here."""
    report: list[Finding] = []
    families = {token for switch, token in FAMILY_SWITCHES.items() if getattr(config, switch)} or {
        "sd15",
        "sd2",
    }
    for name in KohyaConfig.model_fields:
        setting, value = KohyaConfig.setting(name), getattr(config, name)
        ui = setting.ui
        allowed = ui.outside(value, config.LoRA_type)
        if allowed:
            whose = "the page" if name in KilnFields.model_fields else "Kohya's page"
            text = f"{name} is {shown(value)}, outside what {whose} allows ({allowed}); it is taken as it is"
            report.append(Finding("outside", name, value, value, text))
        if value == setting.default or ui.hidden or ui.secret:
            continue
        if ui.shown_with and getattr(config, ui.shown_with[0]) != ui.shown_with[1]:
            continue
        if (ui.families and families.isdisjoint(ui.families)) or (
            ui.lora_types and config.LoRA_type not in ui.lora_types
        ):
            continue
        if ui.trained_choices is not None and value in ui.trained_choices:
            continue
        untrained = ui.trained_choices is not None
        refused = name in FAMILY_SWITCHES and ui.effect != "honoured"
        if ui.effect == "none" or refused or untrained:
            state = "has no effect here" if ui.effect == "none" else "is not trained"
            text = f"{name} {shown(value)} {state}. {ui.reason}"
            report.append(Finding("unsupported", name, value, None, text.rstrip(".")))
    return report


def _kind_of(raw: Mapping[str, Any]) -> FileKind:
    known = sum(key in KohyaConfig.model_fields for key in raw)
    if not LORA_KEYS.isdisjoint(raw):
        return "LoRA"
    if not TEXTUAL_INVERSION_KEYS.isdisjoint(raw):
        return "textual inversion"
    if not FINETUNE_KEYS.isdisjoint(raw):
        return "fine-tuning"
    if not DREAMBOOTH_KEYS.isdisjoint(raw) or known >= WHOLE_FILE_KEYS:
        return "DreamBooth"
    legacy = any(key in RENAMED or key in REMOVED or key in TOLERATED for key in raw)
    return "LoRA" if known or legacy or not raw else "other"


def _is_on(value: Any) -> bool:
    try:
        return switch(value)[0]
    except ValueError:
        return False


def _is_filled_path(config: KohyaConfig, name: str) -> bool:
    setting = KohyaConfig.setting(name)
    if not setting.ui.path and name != "output_name":
        return False
    return getattr(config, name) not in ("", setting.default)
