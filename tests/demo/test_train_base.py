from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from assets.demo import train_base


@pytest.mark.parametrize("shape", [(24, 200), (200, 24), (40, 48), (16, 3, 3, 3)])
def test_update_is_near_u_v_of_the_svd(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(*shape).flatten(1)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    matrix = u @ torch.diag(s * torch.logspace(0, -2, len(s))) @ v  # badly conditioned, as momenta are
    left, values, right = torch.linalg.svd(train_base._orthogonal(matrix).float(), full_matrices=False)
    strong = values > 0.5
    assert values.max() < 1.5
    assert strong.sum() >= 0.6 * len(values)
    # The strongest directions keep their pairing of left and right vectors.
    assert torch.trace(u[:, :5].T @ left @ torch.diag(values) @ right @ v[:5].T) > 5 * 0.6


def test_resumed_training_equals_unbroken_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_base, "SAVE_EVERY_S", -1.0)

    def train(work: Path, stop: int | None) -> dict[str, Tensor]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 3))

        def loss_of(step: int) -> Tensor:
            if step == stop:
                raise InterruptedError
            x = torch.randn(4, 6)
            loss: Tensor = (model(x) - x[:, :3].sin()).square().mean()
            return loss

        averaged = train_base.run_steps("t", {"m": model}, loss_of, work, 40, 1e-2, 0.02, ema_decay=0.9)
        return {**model.state_dict(), **{f"ema.{k}": v for k, v in averaged["m"].state_dict().items()}}

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    unbroken = train(tmp_path / "a", None)
    with pytest.raises(InterruptedError):
        train(tmp_path / "b", 23)
    resumed = train(tmp_path / "b", None)
    assert unbroken.keys() == resumed.keys()
    assert all(torch.equal(unbroken[key], resumed[key]) for key in unbroken)


def test_near_linear_start_passes_pictures_on() -> None:
    torch.manual_seed(0)
    vae = train_base.make_vae()
    train_base.start_near_linear(vae)
    posterior = vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist
    assert posterior.std.mean().item() < 0.1


@torch.no_grad()
def test_standardise_changes_latents_not_pictures() -> None:
    torch.manual_seed(0)
    vae = train_base.make_vae()
    pictures_BCHW = torch.rand(2, 3, 64, 64) * 2 - 1
    before = vae.decode(vae.encode(pictures_BCHW).latent_dist.mode()).sample
    train_base.standardise(vae)
    after = vae.decode(vae.encode(pictures_BCHW).latent_dist.mode()).sample
    torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-4)
