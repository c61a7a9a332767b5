"""Tasks in forks."""

import os
import signal
import time
from functools import partial

import pytest

from pipeline.core.errors import DataError, WorkerError
from pipeline.machine.forks import run_in_forks


def test_every_task_runs_once_and_no_slot_is_taken_twice_at_a_time(tmp_path):
    def task(number, slot):
        held = tmp_path / f"slot-{slot}"
        held.mkdir()  # fails if another task has the slot
        time.sleep(0.01 * (number % 3))
        held.rmdir()
        (tmp_path / f"task-{number}").write_text(f"{slot} {os.getpid()}")

    list(run_in_forks([partial(task, number) for number in range(7)], 3))
    results = [path.read_text().split() for path in sorted(tmp_path.glob("task-*"))]
    assert len({process for _, process in results} | {str(os.getpid())}) == 4
    assert {slot for slot, _ in results} == {"0", "1", "2"}


def test_fewer_tasks_than_slots(tmp_path):
    list(run_in_forks([], 4))
    list(run_in_forks([lambda slot: (tmp_path / str(slot)).touch()], 4))
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


def sleep_in(directory):
    """A task that says which process it is, then goes on for ever."""

    def task(slot):
        (directory / str(os.getpid())).touch()
        time.sleep(1000)

    return task


def gone(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def after_one_sleeps(directory, act):
    """A task that acts when another one has said which process it is."""

    def task(slot):
        while not list(directory.iterdir()):
            time.sleep(0.01)
        act()

    return task


def raise_large():
    raise DataError("x" * 1_000_000)  # more than a pipe holds


@pytest.mark.parametrize(
    ("act", "error"),
    [
        (raise_large, DataError),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), WorkerError),
        (lambda: os._exit(3), WorkerError),
        (lambda: bytearray(1 << 62), MemoryError),
        (lambda: os.kill(os.getpid(), signal.SIGINT), KeyboardInterrupt),
        (lambda: os.kill(os.getppid(), signal.SIGINT), KeyboardInterrupt),
    ],
)
def test_the_first_to_fail_ends_all(tmp_path, act, error):
    (tmp_path / "running").mkdir()
    tasks = [sleep_in(tmp_path / "running"), after_one_sleeps(tmp_path / "running", act)]
    with pytest.raises(error):
        list(run_in_forks([*tasks, lambda slot: (tmp_path / "third").touch()], 2))
    (process,) = (int(path.name) for path in (tmp_path / "running").iterdir())
    assert gone(process)
    assert not (tmp_path / "third").exists()


def test_an_error_tells_where_it_was_raised():
    with pytest.raises(DataError, match="xxx") as caught:
        list(run_in_forks([lambda slot: raise_large()], 1))
    assert "in raise_large" in caught.value.__notes__[0]


class OddError(Exception):
    def __init__(self, one, two):
        super().__init__(one)


def test_an_error_that_does_not_pickle_is_told_in_words():
    def task(slot):
        raise OddError("first", "second")

    with pytest.raises(RuntimeError, match=r"OddError in a fork: first\nTraceback"):
        list(run_in_forks([task], 1))


def test_forks_end_with_their_parent(tmp_path):
    parent = os.fork()
    if not parent:
        try:
            list(run_in_forks([sleep_in(tmp_path)] * 2, 2))
        finally:
            os._exit(1)
    while len(forks := list(tmp_path.iterdir())) < 2:
        time.sleep(0.01)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    deadline = time.monotonic() + 10
    while not all(gone(int(path.name)) for path in forks):
        assert time.monotonic() < deadline
        time.sleep(0.01)
