from __future__ import annotations

import pytest

from tests.config.eras import written_on
from trainer.config import KohyaConfig, dumps, loads, with_values
from trainer.errors import ConfigError


def test_texts_are_read_as_the_settings_type() -> None:
    config = KohyaConfig(epoch=3)
    changed = with_values(
        config,
        {
            "network_dim": "16",
            "network_alpha": "8.0",
            "learning_rate": "2e-4",
            "flip_aug": "true",
            "enable_bucket": "0",
            "output_name": " spaced ",
            "mixed_precision": "bf16",
            "optimizer": "some.module.Class",
            "lora_network_weights": "old.safetensors",
            "caption_extension": ".tags",
        },
    )
    assert (changed.network_dim, changed.network_alpha, changed.learning_rate) == (16, 8, 2e-4)
    assert type(changed.network_alpha) is int
    assert (changed.flip_aug, changed.enable_bucket, changed.epoch) == (True, False, 3)
    assert (changed.output_name, changed.mixed_precision) == (" spaced ", "bf16")
    assert (changed.optimizer, changed.network_weights) == ("some.module.Class", "old.safetensors")
    assert changed.caption_extension == ".tags"
    assert config == KohyaConfig(epoch=3)


def test_numbers_beyond_a_slider_are_taken() -> None:
    assert with_values(KohyaConfig(), {"network_dim": "1024"}).network_dim == 1024


def test_unknown_keys_of_the_file_stay() -> None:
    config = KohyaConfig.model_validate({"mine": 1})
    assert with_values(config, {"epoch": "2"}).model_extra == {"mine": 1}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"network_dims": "8"}, "network_dim"),
        ({"lr": "1"}, "no setting named 'lr'"),
        ({"totally_else": "8"}, "no setting named"),
        ({"network_dim": "eight"}, "whole number"),
        ({"learning_rate": "nan"}, "a number"),
        ({"flip_aug": "perhaps"}, "true and false"),
        ({"mixed_precision": "fp61"}, "no, fp16, bf16"),
        ({"epoch": "x" * 5000}, "whole number"),
    ],
)
def test_what_cannot_be_is_one_sentence(values: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        with_values(KohyaConfig(), values)
    message = str(caught.value)
    assert says in message
    assert len(message) < 250
    assert next(iter(values)) in message


def test_a_setting_of_our_own_is_written_only_where_it_is_set() -> None:
    loaded = loads({"LoRA_type": "Standard", "quantized_base": "NF4"})
    assert loaded.config.quantized_base == "nf4"
    assert '"quantized_base": "nf4"' in dumps(loaded.config)
    changed = with_values(loaded.config, {"quantized_base": "int8", "network_dim": "3"})
    assert changed.quantized_base == "int8"
    assert changed.network_dim == 3
    assert "quantized_base" not in dumps(with_values(changed, {"quantized_base": ""}))
    assert "quantized_base" not in dumps(KohyaConfig())
    # it says nothing about when Kohya wrote the file
    old = written_on("2023-01-20")
    plain, own = loads(old), loads(old | {"quantized_base": "nf4"})
    assert own.config == plain.config.model_copy(update={"quantized_base": "nf4"})
    assert [item.message for item in own.report] == [item.message for item in plain.report]
    wrong = loads({"LoRA_type": "Standard", "quantized_base": "int3"})
    (finding,) = [finding for finding in wrong.report if finding.key == "quantized_base"]
    assert finding.kind == "outside"
    assert "nf4" in finding.message
    with pytest.raises(ConfigError, match="int8, nf4"):
        with_values(wrong.config, {"quantized_base": "fp4"})
