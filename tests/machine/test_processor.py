"""How much of the CPU a process may use: fake control groups, and the real affinity and environment."""

import os
import subprocess
import sys

import pytest
import torch

from pipeline.core.provenance import ROOT
from pipeline.machine.device import cpu_threads, side_by_side
from pipeline.machine.processor import cores, free_memory, threads
from tests.support.files import tiny_params

CPU = torch.device("cpu")
FIRST = str(min(os.sched_getaffinity(0)))  # of the cores that are for this process


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Eight cores, all for this process, and nothing in the environment."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


def system(root, groups, files):
    """A file system that says of which control groups a process is, and what their files hold."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("\n".join(groups) + "\n")
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def version_1(folder, quota, period=100000):
    return {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": period}


QUOTAS = {
    "none": ([], {}, 8),
    "version 2, without": (["0::/"], {"cpu.max": "max 100000"}, 8),
    "version 2, a container's own root": (["0::/"], {"cpu.max": "300000 100000"}, 3),
    "version 2, parts of cores": (["0::/"], {"cpu.max": "250000 100000"}, 3),
    "version 2, less than a core": (["0::/"], {"cpu.max": "10000 100000"}, 1),
    "version 2, another period": (["0::/"], {"cpu.max": "20000 10000"}, 2),
    "version 2, more than there are": (["0::/"], {"cpu.max": "6400000 100000"}, 8),
    "version 2, the group itself": (["0::/a/b"], {"a/b/cpu.max": "200000 100000", "a/cpu.max": "max 100000"}, 2),
    "version 2, the group around it": (["0::/a/b"], {"a/b/cpu.max": "500000 100000", "a/cpu.max": "200000 100000"}, 2),
    "version 2, the outermost group": (["0::/a/b/c"], {"a/b/c/cpu.max": "max 100000", "cpu.max": "400000 100000"}, 4),
    "version 2, another group": (["0::/a"], {"b/cpu.max": "100000 100000", "a/cpu.max": "max 100000"}, 8),
    "version 2, beside a namespace": (["0::/../b"], {"cpu.max": "300000 100000"}, 3),
    "version 2 under version 1": (["1:cpu:/", "0::/a"], {"unified/a/cpu.max": "200000 100000"}, 2),
    "version 1, without": (["4:cpu,cpuacct:/a"], version_1("cpu,cpuacct/a", -1), 8),
    "version 1": (["4:cpu,cpuacct:/a", "3:memory:/a"], version_1("cpu,cpuacct/a", 200000), 2),
    "version 1, by the other name": (["4:cpu,cpuacct:/a"], version_1("cpu/a", 150000), 2),
    "version 1, the group around it": (
        ["1:cpu:/a/b"],
        {**version_1("cpu/a/b", 700000), **version_1("cpu/a", 300000)},
        3,
    ),
    "version 1, a container that sees its own group": (["1:cpu:/docker/0123"], version_1("cpu", 400000), 4),
    "version 1, accounting alone": (["2:cpuacct:/a", "1:cpu:/"], version_1("cpuacct/a", 100000), 8),
    "damaged": (["0::/"], {"cpu.max": "many"}, 8),
}


@pytest.mark.parametrize("kind", QUOTAS)
def test_the_tightest_quota_counts(tmp_path, kind):
    groups, files, expected = QUOTAS[kind]
    found = cores(system(tmp_path, groups, files))
    assert found.most == expected
    assert ("CPU quota" in found.reason) == (expected < 8)
    assert threads(tmp_path) == found


def limits(folder, limit, used, cache=0, version=2):
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    values = dict(zip(names, (limit, used), strict=True)) | {"memory.stat": f"anon 1\ninactive_file {cache}"}
    return {f"{folder}{name}": value for name, value in values.items()}


LIMITS = {
    "version 2": (["0::/a"], limits("a/", 9000, 2000), 7000),
    "version 2, memory that the kernel can take back": (["0::/a"], limits("a/", 9000, 2000, cache=1500), 8500),
    "version 2, the group around it": (["0::/a/b"], limits("a/b/", "max", 5) | limits("a/", 4000, 1000), 3000),
    "version 2, full": (["0::/"], limits("", 4000, 4100), 0),
    "version 1": (["4:memory:/a", "1:cpu:/b"], limits("memory/a/", 9000, 2000, version=1), 7000),
    "version 1, a container that sees its own group": (["4:memory:/x"], limits("memory/", 900, 200, version=1), 700),
    "version 1, without": (["4:memory:/a"], limits("memory/a/", 2**63 - 4096, 5, version=1), None),
    "none": ([], {}, None),
    "no limit": (["0::/a"], limits("a/", "max", 2000), None),
    "damaged": (["0::/a"], limits("a/", "much", 2000), None),
}


@pytest.mark.parametrize("kind", LIMITS)
def test_the_tightest_limit_of_memory_counts(tmp_path, monkeypatch, kind):
    groups, files, expected = LIMITS[kind]
    monkeypatch.setattr(os, "sysconf", {"SC_AVPHYS_PAGES": 25, "SC_PAGE_SIZE": 4096}.get)
    assert free_memory(system(tmp_path, groups, files)) == (102400 if expected is None else expected)


def test_the_least_of_all_limits_counts(tmp_path, monkeypatch):
    system(tmp_path, ["0::/a"], {"a/cpu.max": "450000 100000"})
    assert cores(tmp_path) == (5, f"CPU quota 4.5 in {tmp_path}/sys/fs/cgroup/a")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 4, 5})
    assert cores(tmp_path) == (3, "CPU affinity")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert threads(tmp_path) == (2, "OMP_NUM_THREADS")
    assert cores(tmp_path).most == 3
    monkeypatch.setenv("MKL_NUM_THREADS", "1")
    assert threads(tmp_path) == (1, "MKL_NUM_THREADS")


@pytest.mark.parametrize(
    ("text", "expected"), [("3", 3), (" 3 ", 3), ("3,2", 3), ("99", 8), ("0", 8), ("", 8), ("-1", 8), ("many", 8)]
)
def test_what_the_environment_asks_for(tmp_path, monkeypatch, text, expected):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert threads(tmp_path).most == expected


def runtime(**changes):
    return tiny_params({f"runtime.{name}": value for name, value in changes.items()}).runtime


def test_what_is_set_comes_before_what_is_there(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    unset, four = runtime(threads=None, workers=None), runtime(threads=4, workers=None)
    assert [cpu_threads(unset, processes) for processes in (1, 2, 4, 8, 99)] == [3, 3, 2, 1, 1]
    assert [cpu_threads(four, processes) for processes in (1, 2, 4, 8)] == [4, 2, 1, 1]
    assert [side_by_side(each, CPU) for each in (unset, four, runtime(threads=4, workers=5))] == [8, 4, 5]


SCRIPT = """
import sys
import torch
from pipeline.core.parameters import load_params
from pipeline.machine.device import set_up_device, side_by_side
from pipeline.machine.processor import cores
runtime = load_params(sys.argv[1]).runtime
runtime = runtime.model_copy(update={"threads": int(sys.argv[2]) or None, "workers": None, "device": "cpu"})
device = set_up_device(runtime)
print(torch.get_num_threads(), side_by_side(runtime, device), cores().reason)
"""


def in_a_process(*before, threads=0, **environment):
    """Threads of torch, runs side by side, and what limits the cores, in a fresh process."""
    command = [*before, sys.executable, "-c", SCRIPT, ROOT / "params.yaml", f"{threads}"]
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    ended = subprocess.run(command, env=kept | environment, cwd=ROOT, capture_output=True, text=True, check=True)
    torch_threads, workers, reason = ended.stdout.strip().split(" ", 2)
    return int(torch_threads), int(workers), reason


def test_affinity_and_environment_are_obeyed_in_a_process():
    total = in_a_process()[0]
    if total < 2:
        pytest.skip("one core alone")
    assert in_a_process("taskset", "-c", FIRST) == (1, 1, "CPU affinity")
    assert in_a_process(OMP_NUM_THREADS="1")[:2] == (1, total)
    assert in_a_process(OMP_NUM_THREADS="1", threads=total)[:2] == (total, total)
    assert in_a_process("taskset", "-c", FIRST, threads=2)[:2] == (2, 2)
