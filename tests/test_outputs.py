"""Which files a keep-last rule removes: a brute-force of "what sd-scripts would have deleted"."""

from trainer.outputs import epoch_to_remove, step_to_remove


def test_the_newest_epochs_stay() -> None:
    for every in (1, 2, 3):
        for keep in (1, 2, 5):
            files: set[int] = set()
            for epoch in range(every, 31, every):
                files.add(epoch)
                old = epoch_to_remove(epoch, every, keep)
                if old is not None:
                    files.remove(old)
                assert sorted(files) == sorted(range(every, epoch + 1, every))[-keep:]


def test_steps_are_kept_by_age_in_steps() -> None:
    """save_last_n_steps 200, every 100: at 500 the files 300, 400 and 500 stay (sd-scripts' rule)."""
    files: set[int] = set()
    for step in range(100, 1001, 100):
        files.add(step)
        old = step_to_remove(step, 100, 200)
        if old is not None:
            files.discard(old)
        assert sorted(files) == list(range(max(100, step - 200), step + 1, 100))
    assert step_to_remove(100, 100, 0) is None
    assert step_to_remove(100, 100, 200) is None
