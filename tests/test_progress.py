"""avr_loss, against the definition: the mean of the newest loss at each position of the epoch."""

import math
import random

import torch

from trainer.progress import LossRecorder, Pending, fetch


def test_average_is_the_mean_of_the_last_epochs_worth() -> None:
    length, rng = 7, random.Random(0)
    recorder, newest = LossRecorder(length), {}
    for micro in range(40):
        loss = rng.random()
        newest[micro % length] = loss
        recorder.add(micro % length, loss)
        assert math.isclose(recorder.average, sum(newest.values()) / len(newest), rel_tol=1e-12)


def test_a_resumed_recorder_goes_on() -> None:
    whole, length = LossRecorder(5), 5
    losses = [0.1 * n for n in range(13)]
    for micro, loss in enumerate(losses[:8]):
        whole.add(micro % length, loss)
    resumed = LossRecorder(length, whole.losses)
    for micro, loss in enumerate(losses[8:], start=8):
        whole.add(micro % length, loss)
        resumed.add(micro % length, loss)
    assert math.isclose(whole.average, resumed.average, rel_tol=1e-12)


def test_losses_of_several_steps_come_in_one_transfer_in_order() -> None:
    steps = [
        Pending(
            step=n,
            epoch=1,
            first_micro_in_epoch=0,
            losses=[torch.tensor(float(n)), torch.tensor(n + 0.5)],
            lr={},
        )
        for n in range(3)
    ]
    assert fetch(steps) == [[0.0, 0.5], [1.0, 1.5], [2.0, 2.5]]
    assert fetch([]) == []
