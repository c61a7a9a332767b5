"""Files of a stranger who means harm: refused in one sentence, in little time and memory, whatever they are."""

import multiprocessing
import os
import resource
import shutil
import signal
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest
from h5py import h5d, h5p, h5s, h5t, h5z
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pipeline.core.errors import ShardError
from pipeline.shards import reader as shard_reader
from pipeline.shards.check import check_contents, check_shard, find_problems
from pipeline.shards.file import open_shard
from pipeline.shards.folder import LocalFolder
from pipeline.shards.format import attributes_of, shard_name
from pipeline.shards.manifest import read_manifest
from pipeline.shards.reader import BoundaryShards
from tests.support.files import change_manifest, make_missing, mislabelled, reseal, sample_dataset, tiny_splits

SECONDS, MEGABYTES = 2, 300  # that a refusal may take
NAME = shard_name(0, 0)
ROWS, CLASSES = 24, 4


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """A dataset in each compression."""
    folders = {}
    for compression in ("none", "gzip"):
        directory = tmp_path_factory.mktemp(compression)
        changes = {"attack.views": 1, "attack.compression": compression}
        dataset = sample_dataset(directory, mislabelled(tiny_splits()["train"]), changes)
        make_missing(dataset, directory)
        dataset.publish(directory / "bss")
        folders[compression] = directory / "bss"
    return folders


@pytest.fixture
def directory(datasets, tmp_path):
    return shutil.copytree(datasets["none"], tmp_path / "bss")


def in_a_fork(function, timeout=60):
    """What a function returns or the ShardError that it raises, with its seconds and megabytes."""
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)

    def child():
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak counts from here
        before, begin = _memory("VmRSS"), time.perf_counter()
        try:
            outcome = function()
        except ShardError as error:
            outcome = error
        writer.send((outcome, time.perf_counter() - begin, _memory("VmHWM") - before))

    process = context.Process(target=child)
    process.start()
    process.join(timeout)
    assert process.exitcode == 0, f"exit code {process.exitcode}"
    return reader.recv()


def _memory(name):
    """Megabytes, of this process."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) / 1024


def refused(directory, reseal_first=True):
    """The sentence in which a dataset is refused, by the check of its first shard and by whoever wants to read it."""
    if reseal_first:
        reseal(directory, NAME)

    def check():
        manifest = read_manifest(directory)
        check_shard(directory, manifest, manifest.shards[0])

    def read():
        shards = BoundaryShards(directory, verify=False)
        shards.read(shards.manifest.shards[0], shards.manifest.columns)

    error, seconds, megabytes = in_a_fork(check)
    assert isinstance(error, ShardError), error
    assert seconds < SECONDS
    assert megabytes < MEGABYTES
    _, seconds, megabytes = in_a_fork(read)  # without a check, what is read may be wrong, but costs no more
    assert seconds < SECONDS
    assert megabytes < MEGABYTES
    message = str(error)
    assert "\n" not in message
    assert message.startswith(str(directory))
    return message.removeprefix(f"{directory}/")


def soft_loop(file):
    file["label"] = h5py.SoftLink("/other")
    file["other"] = h5py.SoftLink("/label")


def outside_link(file):
    file["label"] = h5py.ExternalLink("/etc/passwd", "/label")


def outside_storage(file):
    file.create_dataset("label", (ROWS,), np.int64, external=[("/etc/passwd", 0, ROWS * 8)])


def virtual(file):
    layout = h5py.VirtualLayout((ROWS,), np.int64)
    layout[:] = h5py.VirtualSource("/etc/passwd", "label", (ROWS,))
    file.create_virtual_dataset("label", layout)


def vlen_numbers(file):
    file.create_dataset("label", (ROWS,), h5py.vlen_dtype(np.int64), chunks=(ROWS,))


def references(file):
    file.create_dataset("label", (ROWS,), h5py.ref_dtype, chunks=(ROWS,))


def compound(file):
    file.create_dataset("label", (ROWS,), np.dtype([("a", "i8")]), chunks=(ROWS,))


def endless(file):
    file.create_dataset("label", (1 << 60,), np.int64, chunks=(1 << 20,), compression="gzip")


def endless_in_one_chunk(file):
    file.create_dataset("label", (1 << 29,), np.int64, chunks=(1 << 29 - 1,), shuffle=True, compression="gzip")


def nothing_written(file):
    file.create_dataset("label", (ROWS,), np.int64)


def one_chunk(file):
    file.create_dataset("label", data=np.zeros(ROWS, np.int64), chunks=(ROWS,))


def bomb(size):
    """A chunk for a few bytes that inflates to `size`."""

    def make(file):
        column = file.create_dataset("label", (ROWS,), np.int64, chunks=(ROWS,), shuffle=True, compression="gzip")
        deflate = zlib.compressobj(9)
        parts = [deflate.compress(bytes(1 << 20)) for _ in range(size >> 20)]
        column.id.write_direct_chunk((0,), b"".join(parts) + deflate.flush())

    return make


def unknown_filter(file):
    layout = h5p.create(h5p.DATASET_CREATE)
    layout.set_chunk((ROWS,))
    layout.set_filter(40_000, h5z.FLAG_OPTIONAL, (1,))
    column = h5d.create(file.id, b"label", h5t.STD_I64LE, h5s.create_simple((ROWS,)), layout)
    column.write_direct_chunk((0,), bytes(ROWS * 8), 1)


def checksums(file):
    file.create_dataset("label", data=np.zeros(ROWS, np.int64), chunks=(ROWS,), fletcher32=True)


def twice(file):
    del file["distance"]
    file["label"] = np.zeros(ROWS, np.int64)
    file["distance"] = file["margin"]


def growing(file):
    file.create_dataset(
        "label", data=np.zeros(ROWS, np.int64), chunks=(2 * ROWS,), maxshape=(None,), shuffle=True, compression="gzip"
    )


def crowd(file):
    file["label"] = np.zeros(ROWS, np.int64)
    for number in range(2000):
        file.create_group(f"group-{number}")


def with_attribute(file):
    file["label"] = np.zeros(ROWS, np.int64)
    file["label"].attrs["x"] = "a" * 1000


FILES = {
    "external link": (outside_link, "column 'label' is a link to elsewhere"),
    "soft link loop": (soft_loop, "column 'label' is a link to elsewhere"),
    "external storage": (outside_storage, "column 'label' is no dataset of this file"),
    "virtual dataset": (virtual, "column 'label' is no dataset of this file"),
    "group": (lambda file: file.create_group("label"), "column 'label' is no dataset of this file"),
    "named type": (lambda file: file.__setitem__("label", np.dtype("i8")), "column 'label' is no dataset of this file"),
    "strings": (
        lambda file: file.create_dataset("label", data=["x"] * ROWS),
        "column 'label' does not hold plain numbers",
    ),
    "lists": (vlen_numbers, "column 'label' does not hold plain numbers"),
    "references": (references, "column 'label' does not hold plain numbers"),
    "compound": (compound, "column 'label' does not hold plain numbers"),
    "2^60 rows": (endless, f"column 'label' has shape ({1 << 60},)"),
    "2^29 rows": (endless_in_one_chunk, "column 'label' has chunks (268435456,) for shape (536870912,)"),
    "no data": (nothing_written, "column 'label' is not wholly in the file"),
    "one chunk": (one_chunk, "column 'label' is stored in another way (layout 2, filters [])"),
    "bomb of 1 MB, 1 GB": (bomb(1 << 30), "column 'label' has a chunk that is not whole"),
    "small bomb": (bomb(1 << 17), "column 'label' does not decompress to 192 bytes a chunk"),
    "unknown filter": (unknown_filter, "column 'label' is stored in another way (layout 2, filters [40000])"),
    "other filter": (checksums, "column 'label' is stored in another way (layout 2, filters [3])"),
    "one column under two names": (twice, "column 'distance' goes by several names"),
    "growing": (growing, "column 'label' has chunks (48,) for shape (24,)"),
    "2,000 groups": (crowd, "has 2014 columns"),
    "attribute of a column": (with_attribute, "column 'label' has attributes"),
    "missing column": (lambda file: None, "columns are not the manifest's: 'label'"),
    "scalar": (lambda file: file.__setitem__("label", 1), "column 'label' has no rows"),
    "empty": (lambda file: file.__setitem__("label", h5py.Empty("i8")), "column 'label' has no rows"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_column_of_another_kind_is_refused(directory, case):
    make, expected = FILES[case]
    with h5py.File(directory / NAME, "r+") as file:
        del file["label"]
        make(file)
    assert refused(directory).startswith(f"{NAME}: {expected}")


def poke(name, place, value):
    def change(file):
        file[name][place] = value

    return change


def leave_the_image(file):
    scale = file["delta_scale"][7, 0]
    delta = np.where(file["image"][7] > 127, 127, -127).astype(np.int8)
    file["delta"][7, 0] = delta
    file["distance"][7, 0] = np.sqrt((delta.astype(np.float64) ** 2).sum()) * scale


def leave_the_boundary(file):
    base, target = file["label"][7], file["target"][7, 0]
    logits = np.zeros(CLASSES, np.float32)
    logits[base] = 3
    logits[target] = 1
    file["boundary_logits"][7, 0] = logits
    file["margin"][7, 0] = 2


def raise_a_third_class(file):
    logits = np.full(CLASSES, 5, np.float32)
    logits[[file["label"][7], file["target"][7, 0]]] = 1
    file["boundary_logits"][7, 0] = logits
    file["margin"][7, 0] = 0


UNSOUND = {
    "target is base": lambda file: file["target"].__setitem__(7, file["label"][7]),
    "outside of the image": leave_the_image,
    "off the boundary": leave_the_boundary,
    "third class": raise_a_third_class,
}

VALUES = {
    "label too large": (poke("label", 3, CLASSES), "column 'label' holds values that are not possible"),
    "negative label": (poke("label", 3, -1), "column 'label' holds values that are not possible"),
    "target too large": (poke("target", 7, CLASSES), "column 'target' holds values that are not possible"),
    "target is base": (None, "column 'target' names the base class"),
    "teacher NaN": (poke("teacher_logits", 7, np.nan), "column 'teacher_logits' holds values that are not possible"),
    "boundary NaN": (poke("boundary_logits", 7, np.nan), "column 'boundary_logits' holds values that are not possible"),
    "infinite scale": (poke("delta_scale", 7, np.inf), "column 'delta_scale' holds values that are not possible"),
    "negative distance": (poke("distance", 7, -1), "column 'distance' holds values that are not possible"),
    "other index": (poke("index", 7, 6), "column 'index' holds values that are not possible"),
    "scale NaN where nothing was found": (poke("delta_scale", 0, np.nan), "column 'delta_scale' holds values that"),
    "target without a search": (poke("target", 0, 1), "column 'target' holds values that are not possible"),
    "shorter perturbation": (poke("delta", 7, 0), "column 'distance' is not the length of the perturbations"),
    "outside of the image": (None, "column 'delta' leads out of the image"),
    "off the boundary": (None, "column 'status' says of samples that are off the boundary that they converged"),
    "third class": (None, "column 'status' says of samples that are off the boundary that they converged"),
    "status": (poke("status", 7, 9), "column 'status' holds values that are not possible"),
    "statuses": (poke("status", 7, 2), "column 'status' does not count as the manifest says"),
    "crop": (poke("crop", 7, 99), "column 'crop' holds values that are not possible"),
    "flip": (poke("flip", 7, 2), "column 'flip' holds values that are not possible"),
    "margin": (poke("margin", 7, 5), "column 'margin' is not the difference of the logits"),
}


@pytest.mark.parametrize("case", VALUES)
def test_values_that_are_not_possible_are_refused(directory, case):
    change, expected = VALUES[case]
    with h5py.File(directory / NAME, "r+") as file:
        assert file["status"][7, 0] == 0
        if change is None:
            UNSOUND[case](file)
        else:
            change(file)
    assert refused(directory).startswith(f"{NAME}: {expected}")


def test_an_attribute_that_is_a_string_of_any_length_is_not_read(directory):
    with h5py.File(directory / NAME, "r+") as file:
        value = file.attrs["fingerprint"].decode()
        del file.attrs["fingerprint"]
        file.attrs["fingerprint"] = value
    assert refused(directory).startswith(f"{NAME}: is another shard than it was ('fingerprint' is None")


def test_a_file_that_begins_with_something_else_is_refused(directory):
    path = directory / NAME
    path.write_bytes(bytes(512) + path.read_bytes())  # HDF5 itself would find its beginning
    assert refused(directory) == f"{NAME}: not a readable shard (it is no HDF5 file)"


def claim_rows(values):
    values["shards"][0]["rows"] = 1 << 60
    values["rows"] += (1 << 60) - ROWS


def claim_pixels(values):
    values["image_shape"] = [1, 1 << 40, 1 << 40]
    values["columns"]["image"][1] = [1, 1 << 40, 1 << 40]
    values["columns"]["delta"][1] = [1, 1, 1 << 40, 1 << 40]


def nested(depth):
    return {"x": nested(depth - 1)} if depth else 1


MANIFESTS = {
    "padding": (
        lambda v: v["augmentation"].update(padding=10**30),
        "padding 1000000000",
    ),
    "deviation": (lambda v: v.update(std=[1e-300]), "mean or deviation is out of range"),
    "classes of one name": (lambda v: v.update(class_names=["a"] * 4), "two classes have the same name"),
    "many numbers": (lambda v: v.update(parameters={"x": [1] * (1 << 21)}), "not a manifest: it has more lists"),
    "2^60 rows": (claim_rows, "shards.0.rows: Input should be less than or equal to 1000000"),
    "2^80 pixels": (claim_pixels, "images (1, 1099511627776, 1099511627776) of 4 classes are too large"),
    "name above": (lambda v: v["shards"][0].update(name=f"../{NAME}"), "shards.0.name: String should match"),
    "absolute name": (lambda v: v["shards"][0].update(name="/etc/passwd"), "shards.0.name: String should match"),
    "dtype": (lambda v: v["columns"]["delta"].__setitem__(0, "(9999,9999)i8"), "the columns are not those"),
    "many lists": (lambda v: v.update(parameters={"x": [[]] * (1 << 20)}), "not a manifest: it has more lists"),
    "many objects": (lambda v: v.update(parameters={"x": [{}] * (1 << 20)}), "not a manifest: it has more lists"),
    "many names": (
        lambda v: v.update(class_names=["ab"] * (1 << 20)),
        "not a manifest: it has more lists, objects or val",
    ),
    "not a number": (lambda v: v["parameters"].update(x=float("nan")), "not valid JSON (NaN is no number of JSON)"),
    "deep": (lambda v: v["parameters"].update(x=nested(600)), "holds what cannot be written again ("),
    "half a character": (lambda v: v["class_names"].__setitem__(0, "\ud800"), "holds what cannot be written again ("),
    "lines in a name": (lambda v: v.update({"a\nb\x1b[2J": 1}), "a\\nb\\x1b[2J: Extra inputs are not permitted"),
    "long version": (lambda v: v.update(format_version="x" * 9999), f"format version '{'x' * 199}..., this"),
    "long number": (lambda v: v.update(rows=int("9" * 4000)), "the blocks of view 0 do not add up"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_hostile_manifest_is_refused(directory, case):
    change, expected = MANIFESTS[case]
    change_manifest(directory, change)
    assert refused(directory, reseal_first=False).startswith(f"manifest.json: {expected}")


def test_a_number_that_overflows_is_refused(directory):
    change_manifest(directory, lambda values: values["parameters"].update(x=1.25e300))
    path = directory / "manifest.json"
    path.write_text(path.read_text().replace("1.25e+300", "1e999"))
    assert refused(directory, reseal_first=False).startswith("manifest.json: holds what cannot be written again (Out ")


def test_a_manifest_of_a_gigabyte_is_not_read(directory):
    os.truncate(directory / "manifest.json", 1 << 30)
    assert refused(directory, reseal_first=False) == "manifest.json: larger than 16 MiB, refused"


def test_a_manifest_of_16_mib_of_anything_is_refused_in_time(directory):
    for text in (b'"a b c",', b"1.5,", b"[],", b"{},", b"\xff", b'{"a":', b'"\\u0000"'):
        count = (16 << 20) // len(text) - 100
        (directory / "manifest.json").write_bytes(b'{"format_version": 1, "x": [' + text * count)
        refused(directory, reseal_first=False)


CASES = {"none": 7_000, "gzip": 3_000}


@pytest.mark.parametrize("compression", CASES)
def test_ten_thousand_damaged_files_end_in_success_or_in_a_refusal(datasets, tmp_path, compression):
    """With right digests, so that what is inside is looked at; a crash or a hang would show as a failed fork."""
    directory = datasets[compression]
    manifest = read_manifest(directory)
    shard, whole = manifest.shards[0], (directory / NAME).read_bytes()
    metadata = metadata_of(directory / NAME)
    outcomes = {"refused": 0, "read": 0}

    mutation = st.tuples(st.sampled_from(metadata) | st.integers(0, len(whole) - 1), st.integers(0, 255))

    @settings(
        max_examples=CASES[compression],
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(mutation, min_size=1, max_size=8), st.none() | st.integers(0, len(whole)))
    def one(mutations, length):
        content = bytearray(whole)
        for position, value in mutations:
            content[position] = value
        (tmp_path / NAME).write_bytes(content[:length])
        signal.alarm(5)
        try:
            attributes = attributes_of(manifest.format_version, manifest.fingerprint, shard.view, shard.block)
            with open_shard(LocalFolder(tmp_path), NAME, None, attributes) as file:
                check_contents(file, manifest, shard)
            outcomes["read"] += 1
        except ShardError as error:
            outcomes["refused"] += "\n" not in str(error)
        signal.alarm(0)

    def run():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30))
        one()
        return outcomes

    found, _, megabytes = in_a_fork(run, 200)
    assert sum(found.values()) >= CASES[compression] * 0.99  # hypothesis leaves out repetitions
    assert found["read"] > 0
    assert found["refused"] > CASES[compression] / 2
    assert megabytes < MEGABYTES


def metadata_of(path):
    """Positions of bytes of a file that belong to no column."""
    with h5py.File(path) as file:
        taken = np.zeros(path.stat().st_size, bool)
        for column in file.values():
            if column.chunks is None:
                taken[column.id.get_offset() :][: column.nbytes] = True
            for number in range(column.id.get_num_chunks() if column.chunks else 0):
                info = column.id.get_chunk_info(number)
                taken[info.byte_offset : info.byte_offset + info.size] = True
    return np.flatnonzero(~taken).tolist()


def test_a_name_that_is_a_path_is_not_followed(directory):
    """HDF5 takes it for one, through a link out of the file."""
    os.mkfifo(directory.parent / "outside")  # whoever opens it waits for ever
    with h5py.File(directory / NAME) as whole, h5py.File(directory / "old", "w", libver="earliest") as file:
        for name, value in whole.attrs.items():
            file.attrs[name] = value
        file["zz"] = h5py.ExternalLink(str(directory.parent / "outside"), "/")
        file["QQQzzQlabel"] = h5py.SoftLink("/label")
    content = (directory / "old").read_bytes()
    assert content.count(b"QQQzzQlabel") == 1
    (directory / NAME).write_bytes(content.replace(b"QQQzzQlabel", b".//zz/label"))
    assert refused(directory).startswith(f"{NAME}: has a column of an impossible name, './/zz/label'")


def test_a_name_that_moves_the_cursor_is_shown_escaped(directory):
    with h5py.File(directory / NAME, "r+") as file:
        file["\x1b[31mEVIL\nX"] = h5py.SoftLink("/label")
    assert "\x1b" not in refused(directory)
    (directory / "\x1b[31mEVIL\nX.h5").write_bytes(b"")
    problems = find_problems(directory, read_manifest(directory))
    assert all(problem.isprintable() for problem in problems)


def test_an_attribute_too_many_is_refused(directory):
    with h5py.File(directory / NAME, "r+") as file:
        file.attrs["more"] = 1
    assert refused(directory) == f"{NAME}: has 5 attributes, not 4"


@pytest.mark.parametrize("name", [NAME, "manifest.json"])
def test_a_pipe_is_not_waited_for(directory, name):
    (directory / name).unlink()
    os.mkfifo(directory / name)
    if name == NAME:
        expected = f"{name}: cannot be read (it is no regular file)"
    else:
        expected = f"{name}: cannot be read (it is no regular file); is {directory} a sample dataset?"
    assert refused(directory, reseal_first=False) == expected


def test_many_threads_keep_no_more_files_open_than_one(directory, monkeypatch):
    monkeypatch.setattr(shard_reader, "OPEN_FILES", 2)
    shards = BoundaryShards(directory, verify=False)
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda _: [shards.read(shard, ["label"]) for shard in shards.manifest.shards], range(50)):
            pass
    assert len(shards._files) <= 2
