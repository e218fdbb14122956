"""Resizing: ranks by the rules of sd-scripts' resize_lora.py, weights against numpy's decomposition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.tools.loras import SD1, delta64, write
from trainer.errors import ConfigError
from trainer.lora_file import model_hashes, read_lora
from trainer.tools.resize import new_rank, resize

QUIET: dict[str, Any] = {"say": lambda _: None}


def values(count: int, fall: float) -> torch.Tensor:
    """Singular values that fall off, and as many zeros behind them."""
    return torch.cat(
        [fall ** torch.arange(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)]
    )


def test_ranks_follow_the_rules() -> None:
    falling = values(10, 0.5)  # 1, 0.5, 0.25 ...
    assert new_rank(falling, 64, "sv_ratio", 4.0) == 3  # above 1/4: two; and one more
    assert new_rank(falling, 64, "sv_ratio", 4.1) == 4
    # Sums 1, 1.5, 1.75 of 1.998: a share of 0.7 is reached by the second; it counts as 2, and one more.
    assert new_rank(falling, 64, "sv_cumulative", 0.7) == 3
    # Squares 1, 1.25, 1.3125 of 4/3: 0.95 squared is 0.9025, reached by the second.
    assert new_rank(falling, 64, "sv_fro", 0.95) == 3
    assert new_rank(falling, 2, "sv_fro", 0.95) == 2
    assert new_rank(falling, 5, None, 0.0) == 5
    assert new_rank(torch.zeros(4), 5, None, 0.0) == 1


@pytest.mark.parametrize(
    ("method", "parameter"), [(None, None), ("sv_ratio", 3.0), ("sv_fro", 0.9), ("sv_cumulative", 0.6)]
)
def test_each_layer_is_the_nearest_of_its_rank(method: Any, parameter: float | None, tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.safetensors", SD1, 12, 6.0, 1, {"ss_training_comment": "mine", "ss_network_dim": "12"}
    )
    out = tmp_path / "out.safetensors"
    found = resize(file, out, 5, conv_rank=3, method=method, parameter=parameter, precision="float", **QUIET)
    before, after = load_file(file), load_file(out)
    for stem in SD1:
        whole = delta64(before, stem).numpy()
        u, s, vh = np.linalg.svd(whole, full_matrices=False)
        rank = found.ranks[stem]
        assert after[f"{stem}.lora_down.weight"].shape == (rank, *SD1[stem][1:])
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        np.testing.assert_allclose(delta64(after, stem).numpy(), best, rtol=1e-4, atol=1e-5 * s[0])
        assert float(after[f"{stem}.alpha"]) == pytest.approx(0.5 * rank)
        assert found.kept[stem] == pytest.approx(np.linalg.norm(s[:rank]) / np.linalg.norm(s), rel=1e-6)
        limit = 3 if len(SD1[stem]) == 4 else 5
        assert rank == limit if method is None else 1 <= rank <= limit
    metadata = read_lora(out).metadata
    if method is None:
        assert metadata["ss_training_comment"] == "dimension is resized from 12 to 5 (conv: 3); mine"
    else:
        assert metadata["ss_training_comment"] == f"Dynamic resize with {method}: {parameter} from 12; mine"
        assert metadata["ss_network_dim"] == "Dynamic"
    assert {key: metadata[key] for key in model_hashes(after, metadata)} == model_hashes(after, metadata)


def test_names_and_precision_stay(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    key = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    down, up = torch.randn(6, 768, dtype=torch.float16), torch.randn(32, 6, dtype=torch.float16)
    save_file({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, tmp_path / "p.safetensors")
    resize(tmp_path / "p.safetensors", tmp_path / "q.safetensors", 6, **QUIET)
    made = load_file(tmp_path / "q.safetensors")
    assert set(made) == {f"{key}.lora_A.weight", f"{key}.lora_B.weight"}
    product = made[f"{key}.lora_B.weight"].float() @ made[f"{key}.lora_A.weight"].float()
    assert made[f"{key}.lora_A.weight"].dtype == torch.float16
    torch.testing.assert_close(product, up.float() @ down.float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "1 or more"),
        ({"rank": 4, "method": "sv_fro"}, "needs a parameter"),
        ({"rank": 4, "method": "sv_fro", "parameter": 2.0}, "share"),
        ({"rank": 4, "method": "sv_ratio", "parameter": 0.5}, "ratio of 1"),
        ({"rank": 4, "parameter": 0.5}, "dynamic method"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", SD1, 4, 4.0)
    with pytest.raises(ConfigError, match=message):
        resize(file, tmp_path / "b.safetensors", **values, **QUIET)
