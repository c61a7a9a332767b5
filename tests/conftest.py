"""Fixtures of all tests."""

import signal
from pathlib import Path

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


LONGEST_FIRST = (
    "docs/test_docs.py",
    "stages/test_stages.py",
    "stages/test_faults.py",
    "stages/test_pipeline.py",
    "stages/test_cli.py",
    "docs/test_readme.py",
    "report/test_report.py",
    "experiment/test_experiment.py",
)


def pytest_collection_modifyitems(items):
    """Let files that take minutes begin first: several processes, a file each, then end together."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
