"""What holds for all tests: no network, no telemetry, one thread a process, quick tests first."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# Set before any library is imported, here and in pytest's workers, which import this file too.
os.environ.update(
    OMP_NUM_THREADS="1",  # tiny models: threads that wait for each other cost more than they bring
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    GRADIO_ANALYTICS_ENABLED="False",
    DO_NOT_TRACK="1",
    TOKENIZERS_PARALLELISM="false",
    BITSANDBYTES_NOWELCOME="1",
)

# A shell's background job ignores Ctrl-C, and so would the programs under test that it is sent to.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

from tests.chromium import HOW_TO_GET_ONE, find_chromium


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put slow tests after quick ones and those with a browser last; skip GPU tests where there is none."""

    def rank(item: pytest.Item) -> int:
        if item.get_closest_marker("browser"):
            return 2
        return 1 if item.get_closest_marker("slow") else 0

    items.sort(key=rank)  # stable: otherwise as collected
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in on_gpu:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def chromium() -> Path:
    """The browser for tests marked ``browser``; they fail, with the reason, where there is none."""
    found = find_chromium()
    if found is None:
        pytest.fail(HOW_TO_GET_ONE)
    return found
