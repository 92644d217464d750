"""Every test starts from one seed, and memory from torch.empty is NaN, so that an output nobody wrote is seen."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _a_share_of_the_gpu() -> None:
    """With four processes, as the benchmarks' suite runs them, at most 40 GB of a GPU's memory."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 9e9 / total))


@pytest.fixture(autouse=True)
def _seeded_and_poisoned() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms would import Inductor, for seconds
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Imports all tests. Nothing of what they load is garbage, and nobody need look for it, now or while they run."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


# Of files of few tests those that take longest. They begin first, lest one process end with them while the other waits.
LONG = {"test_triton.py", "test_triton_code.py", "test_triton_experts_code.py", "test_cuda_code.py", "test_study.py"}
LONG |= {"test_compiled.py", "test_launching.py", "test_tensor_parallel.py", "test_playground.py", "test_suite.py"}
LONG |= {"test_dial_in_motion.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name not in LONG, -tests[item.path]))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))
