"""One thread and fixed seeds for every test, so that two runs of the suite are the same run."""

import signal
from collections.abc import Iterator

import pytest
import torch

# A shell's & and nohup have processes ignore these, and so would the runs that are tested.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _same_run_every_time() -> Iterator[None]:
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
