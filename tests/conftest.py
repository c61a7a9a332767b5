"""Fixtures of all tests."""

import signal

import pytest
import torch

# A shell that runs the tests in the background ignores Ctrl-C, and all that it starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors of a few kilobytes: handing parts of them to other threads costs many times what it saves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
