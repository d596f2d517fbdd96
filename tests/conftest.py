"""One thread and fixed seeds for every test, so that two runs of the suite are the same run."""

import signal
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

# A shell's & and nohup have processes ignore these, and so would the runs that are tested.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test's cases marked `one_in(n)` every n-th or so stays, the others are slow.

    Multiples of the golden ratio, modulo 1, are spread evenly however parameters alternate.
    """
    seen: Counter[str] = Counter()
    for item in items:
        marker = item.get_closest_marker("one_in")
        if marker is not None:
            test = item.nodeid.split("[")[0]
            if seen[test] * 0.6180339887498949 % 1 >= 1 / marker.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[test] += 1


@pytest.fixture(autouse=True)
def _same_run_every_time() -> Iterator[None]:
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
