"""Writing and reading LoRA files: bytes, hashes worked out by hand, broken files, a full disk, diffusers."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import tiny
from tests.diffusers_reader import loaded_by_diffusers
from tests.networks.small import family, job
from trainer import lora_file
from trainer.draws import Draws
from trainer.errors import ModelFileError, SetupError
from trainer.lora_file import read_lora, read_metadata, save
from trainer.networks.lora import LoraNetwork

NAME = "lora_unet_down_blocks_0_attentions_0_proj_in"


def tensors(rank: int = 4, width: int = 16) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        f"{NAME}.alpha": torch.tensor(2),
        f"{NAME}.lora_down.weight": torch.randn(rank, width),
        f"{NAME}.lora_up.weight": torch.randn(width, rank),
    }


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and payload of a safetensors file, by the format's description."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@pytest.mark.parametrize(
    ("precision", "weights", "alpha"),
    [("float", "F32", "F32"), ("fp16", "F16", "F16"), ("bf16", "BF16", "BF16"), ("", "F32", "I64")],
)
def test_precision(tmp_path: Path, precision: str, weights: str, alpha: str) -> None:
    file = tmp_path / "new" / "a.safetensors"
    size_bytes = save(file, tensors(), {"ss_a": "1"}, precision)
    header, _ = parts(file)
    assert size_bytes == file.stat().st_size
    assert header[f"{NAME}.lora_down.weight"]["dtype"] == weights
    assert header[f"{NAME}.alpha"]["dtype"] == alpha
    assert header[f"{NAME}.alpha"]["shape"] == []
    found = load_file(file)
    weight = found[f"{NAME}.lora_up.weight"]
    assert torch.equal(weight, tensors()[f"{NAME}.lora_up.weight"].to(weight.dtype))
    assert float(found[f"{NAME}.alpha"]) == 2
    assert list(tmp_path.rglob("*.tmp")) == []


def test_model_hash_is_sha256_of_the_payload(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save(file, tensors(), {"ss_a": "1", "modelspec.title": "x"}, "fp16")
    header, payload = parts(file)
    metadata = header["__metadata__"]
    assert metadata["sshs_model_hash"] == hashlib.sha256(payload).hexdigest()
    # Shorter than 1 MiB: the legacy hash is that of nothing.
    assert metadata["sshs_legacy_hash"] == "e3b0c442"


def test_legacy_hash_is_that_of_a_file_with_ss_entries_only(tmp_path: Path) -> None:
    large = tensors(rank=64, width=8192)
    metadata = {"ss_a": "1", "ss_b": "x" * 1000, "modelspec.title": "y" * 3000}
    file, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save(file, large, metadata, "float")
    only_ss = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    save_file({key: value.float() for key, value in large.items()}, other, only_ss)
    expected = hashlib.sha256(other.read_bytes()[0x100000:0x110000]).hexdigest()[:8]
    found = read_metadata(file)
    assert found["sshs_legacy_hash"] == expected != "e3b0c442"
    assert found | metadata == found


@pytest.mark.parametrize("suffix", [".ckpt", ".pt"])
def test_pickled_state_dicts(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a{suffix}"
    size_bytes = save(file, tensors(), {"ss_a": "1"}, "fp16")
    assert size_bytes == file.stat().st_size
    plain = torch.load(file, weights_only=True)
    assert {value.dtype for value in plain.values()} == {torch.float16}
    found = read_lora(file)
    assert found.metadata == {}
    assert all(torch.equal(found.tensors[key], value.half()) for key, value in tensors().items())
    assert read_metadata(file) == {}


def test_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save(file, tensors(), {"ss_a": "ü"}, "")
    found = read_lora(file)
    assert found.metadata["ss_a"] == "ü"
    assert found.tensors.keys() == tensors().keys()
    assert all(torch.equal(found.tensors[key], value) for key, value in tensors().items())


class Danger:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt"])
@pytest.mark.parametrize("content", ["empty", "cut", "noise", "text"])
def test_broken_files_are_named(tmp_path: Path, suffix: str, content: str) -> None:
    file = tmp_path / f"broken{suffix}"
    save(file, tensors(), {}, "fp16")
    data = file.read_bytes()
    noise = torch.randint(0, 256, (500,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    contents = {
        "empty": b"",
        "cut": data[: len(data) // 2],
        "noise": bytes(noise.tolist()),
        "text": b"<html>" * 50,
    }
    file.write_bytes(contents[content])
    with pytest.raises(ModelFileError, match=f"broken{suffix}"):
        read_lora(file)
    if suffix == ".safetensors":
        with pytest.raises(ModelFileError, match=f"broken{suffix}"):
            read_metadata(file)


def test_pickles_do_not_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "evil.pt"
    torch.save({"a": Danger()}, file)
    old = tmp_path / "old.ckpt"
    old.write_bytes(pickle.dumps({"a": Danger()}, protocol=2))
    for path in (file, old):
        with pytest.raises(ModelFileError, match="safety"):
            read_lora(path)
    assert not (tmp_path / "pwned").exists()


def test_other_content_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "list.pt"
    torch.save([1, 2], file)
    with pytest.raises(ModelFileError, match="named tensors"):
        read_lora(file)
    nested = tmp_path / "nested.ckpt"
    torch.save({"state_dict": tensors(), "epoch": 3}, nested)
    assert read_lora(nested).tensors.keys() == tensors().keys()


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="does not exist"):
        read_lora(tmp_path / "gone.safetensors")
    with pytest.raises(ModelFileError, match="folder"):
        read_metadata(tmp_path)


def test_a_full_disk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**9, 10**9 - 100, 100))
    with pytest.raises(SetupError, match=r"make room"):
        save(tmp_path / "deep" / "a.safetensors", tensors(), {}, "fp16")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.safetensors"
    save(file, tensors(), {"ss_a": "old"}, "fp16")

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lora_file, "save_file", fail)
    with pytest.raises(SetupError, match="No space left"):
        save(file, tensors(), {"ss_a": "new"}, "fp16")
    assert read_metadata(file)["ss_a"] == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_bytes_that_changed_on_the_way_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flip(ready: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        save_file(ready, path, metadata)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(lora_file, "save_file", flip)
    with pytest.raises(ModelFileError, match="not written correctly"):
        save(tmp_path / "a.safetensors", tensors(), {}, "fp16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["Standard", "Kohya LoCon"])
@pytest.mark.parametrize("version", [1, 2])
def test_diffusers_loads_every_key_and_gives_the_same_output(
    tmp_path: Path, version: Any, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The real reader of these files: `load_lora_weights`, then prompt -> text states -> prediction."""
    from diffusers import StableDiffusionPipeline

    # sd-scripts' files for a single-file SD 2.x hold proj_in and proj_out with four axes, which
    # diffusers' linear layers do not take; from a folder they have two.
    ours = family(version, single_file=False)
    network = LoraNetwork.create(
        ours,
        job(v2=version == 2, LoRA_type=kind, network_dim=4, network_alpha=3, conv_dim=2, conv_alpha=1),
        Draws(1),
        lambda line: None,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    file = tmp_path / "a.safetensors"
    save(file, network.state_dict(), network.metadata(), "float")

    make = tiny.sd15_folder if version == 1 else tiny.sd2_folder
    pipeline = StableDiffusionPipeline.from_pretrained(make(tmp_path / "model"), safety_checker=None)
    ids = torch.arange(77)[None]
    noisy, timestep = torch.randn(1, 4, 8, 8, generator=generator), torch.tensor([500])

    def predict(text_encoder: Any, unet: Any) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            states = text_encoder(ids).last_hidden_state
            return states, unet(noisy, timestep, states).sample

    plain = predict(pipeline.text_encoder, pipeline.unet)
    assert loaded_by_diffusers(pipeline, file, caplog) == len(network.layers)

    network.attach()
    attached = predict(cast(Any, ours.text_encoders["te1"]), ours.unet)
    theirs = predict(pipeline.text_encoder, pipeline.unet)
    for mine, other, before in zip(attached, theirs, plain, strict=True):
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(mine, before, atol=1e-2)
