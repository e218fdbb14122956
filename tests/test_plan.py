"""Steps and epochs, against the sums of kohya_ss and sd-scripts written out by hand."""

import math
from pathlib import Path

import pytest

from trainer.config import KohyaConfig
from trainer.data.types import Dataset, Fit, Picture, Subset
from trainer.job import Job
from trainer.plan import Plan


def dataset(counts: dict[tuple[int, int], int], repeats: int = 10, suffix: str = ".png") -> Dataset:
    pictures, fits = [], []
    for bucket, count in sorted(counts.items()):
        for index in range(count):
            path = Path(f"{bucket[0]}_{index}{suffix}")
            pictures.append(Picture(path=path, subset=0, size=bucket, caption="", caption_file=None))
            fits.append(Fit(bucket, bucket))
    return Dataset(
        subsets=(Subset(folder=Path("x"), repeats=repeats, class_tokens="x"),),
        pictures=tuple(pictures),
        fits=tuple(fits),
        repeats=(repeats,) * len(pictures),
        buckets=tuple(sorted(counts)),
        num_train_images=repeats * len(pictures),
        num_reg_images=0,
        mean_aspect_error=0.0,
    )


def job(**values: object) -> Job:
    base = {"output_dir": "out", "train_data_dir": "data", "seed": 1, "max_train_steps": 0}
    return Job.from_config(KohyaConfig.model_validate({**base, **values}))


def test_epochs_become_steps_as_the_gui_counts_and_buckets_round_up() -> None:
    data = dataset({(256, 256): 3, (256, 320): 4})  # 30 and 40 samples an epoch
    plan = Plan.make(job(epoch=3, train_batch_size=4), data)
    assert plan.max_train_steps == math.ceil(70 / 4 / 1 * 3)  # 53: the GUI does not know buckets
    assert plan.batches_per_epoch == math.ceil(30 / 4) + math.ceil(40 / 4)  # 18
    assert plan.epochs == math.ceil(53 / 18)
    doubled = Plan.make(job(epoch=3, train_batch_size=4, reg_data_dir="reg"), data)
    assert doubled.max_train_steps == math.ceil(70 / 4 * 3 * 2)


def test_precedence_is_epochs_of_the_engine_then_steps_then_epochs_of_the_gui() -> None:
    data = dataset({(256, 256): 7})
    assert Plan.make(job(max_train_epochs=2, max_train_steps=5, epoch=9), data).max_train_steps == 2 * 70
    assert Plan.make(job(max_train_steps=5, epoch=9), data).max_train_steps == 5
    assert Plan.make(job(epoch=9), data).max_train_steps == 630


def test_accumulation_ends_an_epoch_with_a_short_group() -> None:
    data = dataset({(256, 256): 7}, repeats=1)
    plan = Plan.make(job(max_train_epochs=2, gradient_accumulation_steps=4), data)
    assert plan.updates_per_epoch == 2
    assert plan.max_train_steps == 4


def test_bmp_counts_for_the_engine_not_for_the_gui_unless_there_is_nothing_else() -> None:
    data = dataset({(256, 256): 4}, suffix=".bmp")
    assert Plan.make(job(epoch=1), data).max_train_steps == 40


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        ({"lr_warmup": 10, "max_train_steps": 105}, 10),
        ({"lr_warmup": 10, "lr_warmup_steps": 3, "max_train_steps": 100}, 3),
        ({"lr_warmup": 0, "max_train_steps": 100}, 0),
        ({"lr_warmup": 10, "lr_scheduler": "constant", "max_train_steps": 100}, 0),
    ],
)
def test_warmup(values: dict[str, object], steps: int) -> None:
    assert Plan.make(job(**values), dataset({(256, 256): 4})).warmup_steps == steps
