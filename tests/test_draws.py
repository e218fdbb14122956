"""Draws depend on seed, purpose and place only."""

import math

import torch

from trainer.draws import Draws


def test_a_draw_is_a_function_of_its_place_not_of_the_order() -> None:
    one, two = Draws(7), Draws(7)
    ahead = one.noise([10, 11], (4, 8, 8))
    two.noise([3], (4, 8, 8))
    two.timesteps([10], 0, 1000)
    assert torch.equal(ahead, two.noise([10, 11], (4, 8, 8)))
    # A global batch is the same on one device or on two.
    assert torch.equal(ahead, torch.cat([one.noise([10], (4, 8, 8)), one.noise([11], (4, 8, 8))]))


def test_seeds_purposes_and_places_differ() -> None:
    values = {
        Draws(seed).key(purpose, place)
        for seed in range(20)
        for purpose in ("noise", "timestep")
        for place in range(20)
    }
    assert len(values) == 20 * 2 * 20


def test_noise_is_standard_normal_across_places() -> None:
    noise = Draws(1).noise(range(2000), (1, 4, 4)).double()
    count = noise.numel()
    assert abs(noise.mean()) < 4 / math.sqrt(count)
    assert abs(noise.var() - 1) < 4 * math.sqrt(2 / count)
    # Samples are independent of their neighbours.
    neighbours = (noise[:-1] * noise[1:]).mean()
    assert abs(neighbours) < 4 / math.sqrt(count)


def test_timesteps_are_uniform_within_their_bounds() -> None:
    steps = Draws(3).timesteps(range(20_000), 100, 110)
    counts = torch.bincount(steps - 100, minlength=10).double()
    assert int(steps.min()) == 100
    assert int(steps.max()) == 109
    chi_square = float(((counts - 2000) ** 2 / 2000).sum())
    assert chi_square < 27.9  # 9 degrees of freedom, p = 0.001


def test_an_epoch_holds_every_entry_once_and_batches_never_mix_buckets() -> None:
    buckets = [[0, 0, 1], [2, 3, 3, 3, 4]]
    for epoch in range(5):
        batches = Draws(epoch).batches(epoch, buckets, 2)
        assert sorted(entry for batch in batches for entry in batch) == [0, 0, 1, 2, 3, 3, 3, 4]
        assert all(set(batch) <= {0, 1} or set(batch) <= {2, 3, 4} for batch in batches)
        assert sorted(map(len, batches)) == [1, 1, 2, 2, 2]
    orders = {tuple(Draws(1).batches(epoch, buckets, 2)) for epoch in range(8)}
    assert len(orders) > 4
