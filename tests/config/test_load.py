from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.config.eras import written_on
from trainer.config import Finding, KohyaConfig, Loaded, load, loads, ui_of
from trainer.errors import ConfigError

WHOLE = written_on("2026-07-10")


def only(loaded: Loaded, key: str) -> Finding:
    found = [finding for finding in loaded.report if finding.key == key]
    assert len(found) == 1, found
    return found[0]


def whole(**changes: Any) -> Loaded:
    return loads(WHOLE | changes)


def test_file_of_today_with_default_values_says_nothing() -> None:
    loaded = loads(WHOLE)
    assert loaded.report == ()
    assert loaded.kind == "LoRA"
    settings = {name: getattr(loaded.config, name) for name in KohyaConfig.model_fields}
    assert settings == KohyaConfig().model_dump()
    assert loaded.config.model_extra == {"save_as_bool": False}


@pytest.mark.parametrize(
    ("key", "written", "used"),
    [
        ("network_dim", "32", 32),
        ("network_dim", 32.0, 32),
        ("network_dim", " 32 ", 32),
        ("seed", "", 0),
        ("seed", "1.5", 2),
        ("seed", 2.7, 3),
        ("epoch", "", 0),
        ("epoch", True, 1),
        ("max_train_steps", "", 0),
        ("max_train_steps", "1e3", 1000),
        ("max_train_epochs", "16", 16),
        ("max_token_length", "", 75),
        ("max_token_length", "225", 225),
        ("lr_scheduler_num_cycles", "", 1),
        ("lr_scheduler_power", "", 1),
        ("learning_rate", "1e-5", 1e-5),
        ("learning_rate", "", 0),
        ("unet_lr", "", 0),
        ("noise_offset", "0.05", 0.05),
        ("adaptive_noise_scale", "", 0),
        ("network_alpha", "", 1),
        ("prior_loss_weight", False, 0),
        ("bucket_reso_steps", 64.0, 64),
        ("v2", 1, True),
        ("v2", "True", True),
        ("v2", "0", False),
        ("enable_bucket", "", False),
        ("enable_bucket", 0.0, False),
        ("enable_bucket", "off", False),
        ("xformers", True, "xformers"),
        ("xformers", False, "none"),
        ("xformers", "False", "none"),
        ("LoRA_type", "LoCon", "LyCORIS/LoCon"),
        ("save_model_as", "same as source model", "safetensors"),
        ("save_model_as", "diffusers", "safetensors"),
        ("timestep_sampling", "flux_shift ", "flux_shift"),
        ("max_resolution", 768, "768"),
        ("max_resolution", [512, 768], "512,768"),
        ("optimizer_args", [], ""),
        ("optimizer_args", ["weight_decay=0.1", "betas=0.9,0.99"], "weight_decay=0.1 betas=0.9,0.99"),
        ("sample_prompts", ["a dog", "a cat"], "a dog\na cat"),
        ("model_list", [], ""),
        ("img_attn_dim", 4, "4"),
        ("block_dims", None, ""),
        ("network_weights", None, ""),
    ],
)
def test_value_is_converted(key: str, written: Any, used: Any) -> None:
    loaded = whole(**{key: written})
    value = getattr(loaded.config, key)
    assert (value, type(value)) == (used, type(used))
    findings = [finding for finding in loaded.of("converted") if finding.key == key]
    same_number = isinstance(written, float) and not isinstance(used, bool) and written == used
    if written is None or same_number:
        assert findings == []
    else:
        assert [(finding.found, finding.used) for finding in findings] == [(written, used)]
        assert key in findings[0].message
    assert not loaded.of("invalid")


@pytest.mark.parametrize(
    ("key", "written"),
    [
        ("network_dim", "many"),
        ("network_dim", [8]),
        ("network_dim", {"rank": 8}),
        ("network_dim", 10**30),
        ("network_dim", "9" * 500),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("learning_rate", "nan"),
        ("learning_rate", "1,5"),
        ("learning_rate", 10**400),
        ("epoch", "12 epochs"),
        ("v2", 2),
        ("v2", "maybe"),
        ("v2", []),
        ("output_name", True),
        ("output_name", {"name": "x"}),
        ("output_name", ["a", "b"]),
        ("sample_prompts", [["a"]]),
    ],
)
def test_value_that_cannot_be_read_gives_the_default_and_is_named(key: str, written: Any) -> None:
    loaded = whole(**{key: written})
    default = KohyaConfig.setting(key).default
    assert getattr(loaded.config, key) == default
    finding = only(loaded, key)
    assert finding.kind == "invalid"
    assert finding.used == default
    assert json.dumps(finding.found) == json.dumps(written)
    assert "allowed" in finding.message
    assert len(finding.message) < 250


@pytest.mark.parametrize(
    ("key", "written", "allowed"),
    [
        ("network_dim", 1024, "at most 512"),
        ("bucket_reso_steps", 256, "at most 128"),
        ("min_timestep", -5, "at least 0"),
        ("mixed_precision", "tf32", "no, fp16, bf16, fp8"),
        ("LoRA_type", "Standard+", "Standard"),
        ("max_token_length", 300, "75, 150, 225"),
        ("log_with", "comet", '""'),
        ("network_dropout", 1.5, "at most 1"),
    ],
)
def test_value_outside_the_page_is_taken_with_a_message(key: str, written: Any, allowed: str) -> None:
    loaded = whole(**{key: written})
    assert getattr(loaded.config, key) == written
    (finding,) = [finding for finding in loaded.of("outside") if finding.key == key]
    assert allowed in finding.message


@pytest.mark.parametrize("extension", [".txt2", ".txt-no", ".none-use-foldername", ""])
def test_any_caption_extension_is_a_good_one(extension: str) -> None:
    loaded = whole(caption_extension=extension)
    assert loaded.config.caption_extension == extension
    assert loaded.report == ()


def test_large_rank_is_inside_for_lokr() -> None:
    assert not whole(LoRA_type="LyCORIS/LoKr", network_dim=100_000, conv_dim=100_000).of("outside")


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [
        ("lora_network_weights", "network_weights", "old.safetensors"),
        ("stop_text_encoder_training_pct", "stop_text_encoder_training", 40),
        ("conv_dims", "conv_block_dims", "4,4"),
        ("conv_alphas", "conv_block_alphas", "1,1"),
        ("toml_file", "dataset_config", "set.toml"),
        ("caption_extention", "caption_extension", ".cap"),
        ("cache_latent", "cache_latents", False),
        ("cache_text_encoder_outputs", "sdxl_cache_text_encoder_outputs", True),
        ("no_half_vae", "sdxl_no_half_vae", True),
        ("sdxl_min_timestep", "min_timestep", 100),
        ("sdxl_max_timestep", "max_timestep", 900),
        ("sdxl_checkbox", "sdxl", True),
        ("flux1_clip_l", "clip_l", "l.safetensors"),
        ("flux1_t5xxl", "t5xxl", "t5.safetensors"),
        ("learning_rate_te", "text_encoder_lr", 1e-5),
    ],
)
def test_renamed_key_gives_its_setting_and_goes(old: str, new: str, value: Any) -> None:
    raw = {key: what for key, what in WHOLE.items() if key != new} | {old: value}
    loaded = loads(raw)
    assert getattr(loaded.config, new) == value
    assert old not in (loaded.config.model_extra or {})
    assert only(loaded, old).kind == "converted"


def test_todays_key_counts_where_both_are_filled_in() -> None:
    loaded = whole(lora_network_weights="old", network_weights="new")
    assert loaded.config.network_weights == "new"
    finding = only(loaded, "lora_network_weights")
    assert finding.found == "old"
    assert "new" in finding.message


def test_old_key_fills_an_empty_new_one() -> None:
    assert whole(lora_network_weights="old", network_weights="").config.network_weights == "old"
    assert whole(lora_network_weights="old", network_weights=None).config.network_weights == "old"


@pytest.mark.parametrize(("key", "name"), [("use_wandb", "log_with"), ("use_wandb_checkbox", "log_with")])
@pytest.mark.parametrize(
    ("value", "used"), [(True, "wandb"), ("True", "wandb"), (1, "wandb"), (False, ""), ("False", "")]
)
def test_use_wandb_becomes_log_with(key: str, name: str, value: Any, used: str) -> None:
    assert getattr(whole(**{key: value}).config, name) == used


def test_a_logger_that_is_chosen_stays() -> None:
    assert whole(use_wandb=True, log_with="tensorboard").config.log_with == "tensorboard"


@pytest.mark.parametrize(("bits_8", "used"), [(True, "AdamW8bit"), (False, "AdamW"), ("True", "AdamW8bit")])
def test_use_8bit_adam_chooses_a_missing_optimizer(bits_8: Any, used: str) -> None:
    raw = {key: value for key, value in WHOLE.items() if key != "optimizer"}
    assert loads(raw | {"use_8bit_adam": bits_8}).config.optimizer == used
    assert whole(use_8bit_adam=bits_8, optimizer="Lion").config.optimizer == "Lion"


def test_without_any_optimizer_kohya_reads_adamw() -> None:
    loaded = loads({key: value for key, value in WHOLE.items() if key != "optimizer"})
    assert loaded.config.optimizer == "AdamW"
    assert only(loaded, "optimizer").kind == "missing"


@pytest.mark.parametrize(("locon", "used"), [(True, "LyCORIS/LoCon"), (False, "Standard")])
def test_locon_switch_of_march_2023(locon: bool, used: str) -> None:
    raw = {key: value for key, value in written_on("2023-03-01").items()} | {"locon": locon}
    assert loads(raw).config.LoRA_type == used


def test_keys_of_a_family_are_renamed_only_for_it() -> None:
    raw = {key: value for key, value in WHOLE.items() if key != "sd3_fused_backward_pass"}
    for on in (True, 1, "True"):  # the file that is saved says true, and must say the same as this one
        sd3 = loads(raw | {"sd3_checkbox": on, "fused_backward_pass": True}).config
        assert sd3.sd3_fused_backward_pass is True
        assert "fused_backward_pass" not in (sd3.model_extra or {})
    kept = whole(fused_backward_pass=True)
    assert (kept.config.model_extra or {})["fused_backward_pass"] is True
    assert only(kept, "fused_backward_pass").kind == "unsupported"


def test_unknown_key_is_kept_and_named() -> None:
    loaded = whole(my_note={"a": [1, 2.5, None, "ü"]})
    assert (loaded.config.model_extra or {})["my_note"] == {"a": [1, 2.5, None, "ü"]}
    assert only(loaded, "my_note").kind == "unknown"


def test_removed_key_is_kept_and_explained() -> None:
    loaded = whole(no_token_padding=False)
    assert (loaded.config.model_extra or {})["no_token_padding"] is False
    assert "DreamBooth" in only(loaded, "no_token_padding").message


# --- what a missing key meant when the file was written


def test_file_of_december_2022() -> None:
    loaded = loads(written_on("2022-12-31"))
    config = loaded.config
    assert loaded.kind == "LoRA"
    assert config.network_alpha == config.network_dim == 8  # nothing was scaled
    assert config.max_train_steps == 0
    assert (config.min_bucket_reso, config.max_bucket_reso, config.bucket_no_upscale) == (256, 1024, False)
    assert config.optimizer == "AdamW8bit"
    assert config.LoRA_type == "Standard"
    assert config.xformers == "xformers"
    told = {finding.key for finding in loaded.of("missing")}
    assert told == {"network_alpha", "max_train_steps", "max_bucket_reso", "bucket_no_upscale", ""}


@pytest.mark.parametrize(
    ("day", "alpha_is_rank", "steps", "max_bucket", "no_upscale"),
    [
        ("2023-01-21", True, 0, 1024, False),
        ("2023-01-25", False, 0, 1024, False),
        ("2023-02-20", False, 0, 1024, True),
        ("2023-06-15", False, 0, 1024, True),
        ("2023-07-17", False, 0, 2048, True),
        ("2024-01-15", False, 0, 2048, True),  # an empty text box by then
        ("2024-08-20", False, 1600, 2048, True),
        ("2025-06-01", False, 1600, 2048, True),
    ],
)
def test_missing_keys_by_year(
    day: str, alpha_is_rank: bool, steps: int, max_bucket: int, no_upscale: bool
) -> None:
    config = loads(written_on(day) | {"network_dim": 32}).config
    assert config.network_alpha == (32 if alpha_is_rank else 1)
    assert config.max_train_steps == steps
    assert (config.max_bucket_reso, config.bucket_no_upscale) == (max_bucket, no_upscale)


def test_rank_of_an_old_file_may_be_a_text() -> None:
    config = loads(written_on("2023-01-15") | {"network_dim": "64"}).config
    assert config.network_alpha == 64


def test_logger_added_to_an_older_file_does_not_make_it_young() -> None:
    config = loads(written_on("2023-06-15") | {"log_with": ""}).config
    assert config.max_train_steps == 0


def test_null_number_counts_as_missing() -> None:
    loaded = whole(max_train_steps=None, network_dim=None, enable_bucket=None)
    assert (loaded.config.max_train_steps, loaded.config.network_dim) == (1600, 8)
    assert loaded.config.enable_bucket is True
    assert {finding.key for finding in loaded.of("missing")} == {
        "max_train_steps",
        "network_dim",
        "enable_bucket",
    }
    assert loads(written_on("2023-06-15") | {"max_train_steps": None}).config.max_train_steps == 0


def test_empty_object_is_the_page_as_it_opens_with_kohyas_optimizer() -> None:
    loaded = loads("{}")
    assert loaded.config == KohyaConfig(optimizer="AdamW")
    assert loaded.kind == "LoRA"


# --- files of other tabs


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ({"num_vectors_per_token": 8, "token_string": "zxc", "init_word": "*"}, "textual inversion"),
        ({"train_dir": "./test", "image_folder": "./img", "create_buckets": True}, "fine-tuning"),
        ({"learning_rate_te": 1e-5, "learning_rate_te1": 1e-5, "learning_rate_te2": 0}, "DreamBooth"),
        ({}, "DreamBooth"),
    ],
)
def test_file_of_another_tab_is_named_as_such(keys: dict[str, Any], kind: str) -> None:
    lora = ("LoRA_type", "network_", "unet_lr", "lora", "conv_", "text_encoder_lr")
    raw = {key: value for key, value in WHOLE.items() if not key.startswith(lora)} | keys
    loaded = loads(raw)
    assert loaded.kind == kind
    finding = next(
        finding for finding in loaded.report if finding.key == "" and finding.kind == "unsupported"
    )
    assert kind in finding.message
    assert set(keys) - {"learning_rate_te"} <= set(loaded.config.model_extra or {})


def test_lora_file_with_a_key_of_another_tab_stays_one() -> None:
    assert whole(learning_rate_te=1e-5).kind == "LoRA"


def test_file_of_another_program_is_named_as_such() -> None:
    loaded = loads({"name": "package", "version": "1.0.0"})
    assert loaded.kind == "other"
    assert "none of its 2 keys" in loaded.report[0].message
    assert loaded.config.model_extra == {"name": "package", "version": "1.0.0"}


def test_fragment_is_a_lora_file() -> None:
    loaded = loads({"epoch": "3", "output_name": "x"})
    assert loaded.kind == "LoRA"
    assert loaded.config.epoch == 3


# --- what does nothing here


def test_setting_without_effect_is_named_with_the_reason() -> None:
    finding = only(whole(xformers="none"), "xformers")
    assert finding.kind == "unsupported"
    assert ui_of("xformers").reason.rstrip(".") in finding.message


def test_default_of_a_setting_without_effect_is_not_mentioned() -> None:
    assert not whole(huggingface_repo_id="", xformers="sdpa").report


def test_options_of_a_type_or_family_that_is_not_chosen_are_not_mentioned() -> None:
    assert not whole(use_tucker=True, guidance_scale=1, sd3_clip_l="x", blocks_to_swap=3).report


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sd3_checkbox", True),
        ("lumina_checkbox", True),
        ("anima_checkbox", True),
        ("hunyuan_image_checkbox", True),
    ],
)
def test_family_that_is_not_trained_is_said_before_a_run(key: str, value: Any) -> None:
    assert only(whole(**{key: value}), key).kind == "unsupported"


# --- tokens


def test_tokens_do_not_enter_and_are_not_shown() -> None:
    loaded = whole(
        huggingface_token="hf_secret1",
        wandb_api_key="secret2",
        wandb_api_key_textbox="secret3",
        additional_parameters='--sample_at_first --wandb_api_key=secret4 --huggingface_token "secret 5" --seed 3',
    )
    assert loaded.config.huggingface_token == ""
    assert loaded.config.wandb_api_key == ""
    assert loaded.config.additional_parameters == "--sample_at_first --seed 3"
    assert "secret" not in repr(loaded.report)
    assert {finding.key for finding in loaded.of("unsupported")} == {
        "huggingface_token",
        "wandb_api_key",
        "additional_parameters",
    }


def test_token_under_its_older_name_does_not_enter_either() -> None:
    raw = {key: value for key, value in WHOLE.items() if key != "wandb_api_key"}
    loaded = loads(raw | {"wandb_api_key_textbox": "secret3"})
    assert loaded.config.wandb_api_key == ""
    assert "secret" not in repr(loaded)


# --- text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(json.dumps(WHOLE | {"output_name": "größe 猫"}, ensure_ascii=False).encode(encoding))
    loaded = load(path)
    assert loaded.config.output_name == "größe 猫"
    assert loaded.path == path
    assert loaded.report == ()


def test_text_with_a_byte_order_mark() -> None:
    assert loads('\ufeff{"epoch": 2}').config.epoch == 2


def test_comments_trailing_commas_and_line_breaks_are_understood() -> None:
    loaded = loads(
        """{
        // how often
        "epoch": 7, /* was 10,
        earlier */
        "output_name": "a // b /* c */, }", // text stays
        "sample_prompts": "one
two",
        "additional_parameters": "say \\"//\\"",
        }"""
    )
    config = loaded.config
    assert (config.epoch, config.output_name) == (7, "a // b /* c */, }")
    assert config.sample_prompts == "one\ntwo"
    assert config.additional_parameters == 'say "//"'
    assert [finding.key for finding in loaded.of("converted")] == ["", ""]


def test_key_that_stands_twice_is_named_and_the_last_counts() -> None:
    loaded = loads('{"epoch": 1, "network_dim": 4, "epoch": 5, "note": {"a": 1, "a": 2}}')
    assert loaded.config.epoch == 5
    assert only(loaded, "epoch").message.startswith('"epoch" stands in the file twice')


def test_nan_and_infinity_tokens() -> None:
    loaded = loads('{"learning_rate": NaN, "unet_lr": -Infinity, "mine": Infinity}')
    assert {finding.key for finding in loaded.of("invalid")} == {"learning_rate", "unet_lr"}
    assert (loaded.config.model_extra or {})["mine"] == float("inf")


def test_half_characters_do_no_harm() -> None:
    loaded = loads('{"output_name": "a\\ud800b", "k\\udfff": "\\ud800"}')
    assert loaded.config.output_name == "a?b"
    assert (loaded.config.model_extra or {}) == {"k?": "\ud800"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("  \n", "is empty"),
        ("[]", "holds a list"),
        ('"text"', "holds a text"),
        ("3", "holds a number"),
        ("null", "holds null"),
        ("true", "holds true or false"),
        ('{"epoch": 1', "line 1, column 12"),
        ('{\n  "epoch" 1\n}', "line 2, column 11"),
        ('{"a": 1}\n{"b": 2}', "line 2, column 1"),
        (r'{"vae": "C:\models\x.pt"}', "backslash"),
        ("epoch = 3", "not its TOML"),
        ("{'epoch': 3}", "line 1, column 2"),
        ('{"a": ' + "[" * 200 + "]" * 200 + "}", "more than 100 deep"),
        ('{"a": ' + "[" * 100_000, "too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "5,000 digits"),
        ("{" + " " * 10_000_001 + "}", "too large"),
        ('{"a": "' + "\\" * 200_001, "not valid JSON"),
        ("/*" * 100_000, "not valid JSON"),
    ],
)
def test_what_is_no_configuration_ends_in_one_sentence(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loads(text)
    message = str(caught.value)
    assert says in message
    assert message.startswith("the configuration ")
    assert "\n" not in message
    assert len(message) < 300


def test_position_of_an_error_counts_comments_too() -> None:
    with pytest.raises(ConfigError, match="line 3, column 22"):
        loads('{\n  // a comment,\n  "epoch" /* here */ 1\n}')


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(ConfigError, match=r"UTF-8 \(byte 13\)"):
        loads(b'{"vae": "gr\xc3\xb6\xf6\xdfe"}'.replace(b"\xc3\xb6", b"o"))


def test_object_with_something_that_json_cannot_hold() -> None:
    with pytest.raises(ConfigError, match="JSON cannot"):
        loads({"vae": Path("x")})


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        load(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="is a folder"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load("a\0b")
    large = tmp_path / "large.json"
    with large.open("wb") as handle:
        handle.truncate(10_000_001)
    with pytest.raises(ConfigError, match="too large"):
        load(large)


@pytest.mark.skipif(
    sys.platform == "win32" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all"
)
def test_file_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text("{}")
    path.chmod(0)
    with pytest.raises(ConfigError, match="cannot be read"):
        load(path)


def test_message_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"broken\.json is not valid JSON at line 1, column 2"):
        load(path)
