"""Datasets behind a URL, and streams: the same rows as from the folder, and no more bytes than needed."""

import copy
import functools
import http.server
import pickle
import shutil
import threading
from hashlib import sha256

import fsspec
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pipeline.core.errors import ShardError
from pipeline.core.provenance import ROOT
from pipeline.shards.reader import BoundaryShards
from pipeline.shards.stream import StreamedShards
from tests.support.files import flip_bit, make_missing, mislabelled, run_stage, sample_dataset, tiny_splits
from tests.support.web import Handler, served

BUCKET = "samples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset of 4 views in 12 shards."""
    directory = tmp_path_factory.mktemp("made")
    dataset = sample_dataset(directory, mislabelled(tiny_splits()["train"]), {"attack.views": 4})
    make_missing(dataset, directory)
    dataset.publish(directory / "bss")
    return directory / "bss"


@pytest.fixture(scope="module")
def web(folder):
    """The URL of the folder on a server of this machine."""
    with served(folder.parent) as url:
        yield f"{url}/bss"


@pytest.fixture(scope="module")
def bucket(folder):
    """The URL of the dataset in an S3 bucket on this machine."""
    import boto3
    from moto.server import ThreadedMotoServer

    patch = pytest.MonkeyPatch()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    address = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_ENDPOINT_URL", address),
    ):
        patch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=address)
    client.create_bucket(Bucket=BUCKET)
    for path in folder.iterdir():
        client.upload_file(str(path), BUCKET, f"bss/{path.name}")
    yield f"s3://{BUCKET}/bss"
    patch.undo()
    server.stop()


@pytest.fixture(params=["web", "bucket"])
def url(request):
    return request.getfixturevalue(request.param)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_rows_behind_a_url_are_those_of_the_folder(folder, url):
    here, there = BoundaryShards(folder), BoundaryShards(url)
    assert len(here) == len(there) == 256
    for row in (0, 100, 255):
        assert same(here[row], there[row])
    assert all(same(a, b) for a, b in zip(here.__getitems__([3, 250, 4]), there.__getitems__([3, 250, 4]), strict=True))
    for shard in here.manifest.shards[::5]:
        columns = there.read(shard, there.manifest.columns)
        for name, values in here.read(shard, here.manifest.columns).items():
            np.testing.assert_array_equal(columns[name], values)


def test_a_row_of_a_remote_dataset_does_not_cost_the_dataset(folder, web):
    size = sum(path.stat().st_size for path in folder.glob("*.h5"))
    shards = BoundaryShards(web)
    before = Handler.sent
    shards[100]
    assert 0 < Handler.sent - before < size / 6
    before = Handler.sent
    shards[101]  # of the same shard, whose layout is known
    assert Handler.sent - before < 2 * sum(shards._row_bytes.values())


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_loader_read_a_url(folder, web, start):
    there = BoundaryShards(web)
    there[0]  # connected before the fork
    loader = DataLoader(there, batch_size=64, num_workers=2, multiprocessing_context=start)
    rows = [index for batch in loader for index in batch["index"].tolist()]
    assert rows == [*range(64)] * 4


def test_a_remote_dataset_can_be_verified(folder, web, tmp_path):
    assert len(BoundaryShards(web, verify=True)) == 256


def test_what_is_not_behind_a_url_is_told_in_one_line(url, web, folder):
    with pytest.raises(ShardError, match=r"other/manifest\.json: cannot be read") as caught:
        BoundaryShards(url.replace("bss", "other"))
    assert "\n" not in str(caught.value)
    with pytest.raises(ShardError, match="cannot be read"):
        BoundaryShards("nothing://host/bss")
    with pytest.raises(ShardError, match=r"manifest\.json: cannot be read"):
        BoundaryShards("http://127.0.0.1:9/bss")


def test_a_damaged_remote_shard_is_found_when_it_is_verified(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "bss")
    flip_bit(copy / "view-001-block-00000.h5", 4000)
    memory = fsspec.filesystem("memory")
    memory.put(str(copy), "/damaged", recursive=True)
    with pytest.raises(
        ShardError, match=r"memory://damaged/view-001-block-00000\.h5: its sha256 is not the manifest's"
    ):
        BoundaryShards("memory://damaged", verify=True)


def keys_of(rows):
    """What tells rows of the dataset apart."""
    return [
        (int(row["index"]), tuple(row["boundary_logits"].flatten().tolist()), *row["crop"].tolist()) for row in rows
    ]


def images_of(keys):
    """The images of rows, by their number in the training split."""
    return sorted(index for index, *_ in keys)


def test_an_epoch_has_every_image_once_in_an_order_of_its_own(folder):
    plain = set(keys_of(BoundaryShards(folder)[row] for row in range(256)))
    stream = StreamedShards(folder, seed=3)
    first = keys_of(stream)
    assert images_of(first) == list(range(64))
    assert set(first) <= plain
    assert [index for index, *_ in first] != list(range(64))
    assert keys_of(StreamedShards(folder, seed=3)) == first
    assert keys_of(StreamedShards(folder, seed=4)) != first


def test_as_many_epochs_as_there_are_views_have_every_row_once(folder):
    plain = keys_of(BoundaryShards(folder)[row] for row in range(256))
    stream, rows = StreamedShards(folder, seed=3), []
    for epoch in range(4):
        stream.set_epoch(epoch)
        rows += keys_of(stream)
    assert sorted(rows) == sorted(plain)


def test_an_epoch_of_all_views_has_every_row_once(folder):
    plain = keys_of(BoundaryShards(folder)[row] for row in range(256))
    stream = StreamedShards(folder, seed=3, all_views=True)
    first = keys_of(stream)
    assert sorted(first) == sorted(plain)
    assert first != plain
    stream.set_epoch(1)
    second = keys_of(stream)
    assert sorted(second) == sorted(plain)
    assert second != first


def test_rows_of_a_stream_are_those_of_the_dataset(folder):
    known = {key: BoundaryShards(folder)[row] for row, key in enumerate(keys_of(BoundaryShards(folder)))}
    for row in StreamedShards(folder, all_views=True, buffer_shards=2):
        assert same(row, known[keys_of([row])[0]])


@pytest.mark.parametrize("all_views", [False, True])
def test_workers_and_processes_share_a_stream_out(folder, url, all_views):
    expected = sorted(keys_of(StreamedShards(folder, all_views=all_views)))
    found = []
    for rank in range(2):
        loader = DataLoader(
            StreamedShards(url, all_views=all_views, rank=rank, world_size=2),
            batch_size=None,
            num_workers=2,
            multiprocessing_context="spawn",
        )
        found += keys_of(loader)
    assert sorted(found) == expected


@pytest.mark.parametrize(
    "arguments",
    [{"seed": -1}, {"buffer_shards": 0}, {"rank": 1}, {"rank": -1}],
)
def test_a_stream_refuses_what_is_out_of_range(folder, arguments):
    with pytest.raises(ValueError, match="expected"):
        StreamedShards(folder, **arguments)


def test_the_example_of_the_page_reads_a_url(url, monkeypatch):
    example = (
        (ROOT / "docs/SHARING.md").read_text().split("<!-- example: reading a URL -->\n```python\n")[1].split("```")[0]
    )
    monkeypatch.setenv("SAMPLES", url)
    values = {}
    exec(example, values)
    assert values["row"]["samples"].shape == (1, 1, 8, 8)
    found = int(values["found"].sum())
    assert found > 0
    assert values["samples"].shape == (found, 1, 8, 8)
    assert values["logits"].shape == (found, 4)


def test_commands_look_at_a_url(url):
    verified, described = run_stage("shards", "verify", url), run_stage("shards", "info", url)
    assert verified.stdout.startswith(f"{url}: whole, 12 shards, 256 samples"), verified.stderr
    assert "training images           64" in described.stdout, described.stderr
    missing = run_stage("shards", "verify", url.replace("bss", "other"))
    assert missing.exit_code == 1
    assert "other/manifest.json: cannot be read" in missing.stderr
    assert missing.stderr.count("\n") == 1


def test_a_server_that_answers_no_range_requests_is_named(folder, monkeypatch):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        shards = BoundaryShards(f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(ShardError, match=r"block-00000\.h5: .*the server does not answer range requests"):
            shards[0]
    finally:
        server.shutdown()


@pytest.mark.parametrize("way", ["chunks", "gzip"])
def test_a_server_that_does_not_say_how_large_a_file_is_is_named(folder, way):
    class Unsaid(Handler):
        root = folder

        def send_header(self, name, value):
            if name == "Content-Length" and way == "gzip":
                super().send_header("Content-Encoding", "gzip")
            elif name != "Content-Length":
                super().send_header(name, value)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Unsaid)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(ShardError, match=r"manifest\.json: .*the server does not say how large the file is"):
            BoundaryShards(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()


def pointer_to(path):
    """What a clone of a repository has in the place of a file that Git LFS holds."""
    digest, size = sha256(path.read_bytes()).hexdigest(), path.stat().st_size
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n"


@pytest.mark.parametrize("name", ["manifest.json", "view-001-block-00002.h5"])
@pytest.mark.parametrize("where", ["path", "url"])
def test_pointers_of_git_lfs_are_named_with_how_to_fetch_the_files(folder, tmp_path, name, where):
    clone = shutil.copytree(folder, tmp_path / "clone")
    (clone / name).write_text(pointer_to(folder / name))
    message = f"{name}: .*a pointer of Git LFS, not the file itself: fetch it with: git lfs pull"
    place = clone if where == "path" else f"memory://{tmp_path.name}"
    if where == "url":
        fsspec.filesystem("memory").put(f"{clone}/", place, recursive=True)
    with pytest.raises(ShardError, match=message):
        BoundaryShards(place)[2 * 64 - 1]  # the last row of view 1
    if where == "path":
        result = run_stage("shards", "verify", clone)
        assert result.exit_code == 1
        assert "git lfs pull" in result.output


def pickled(stream):
    return pickle.loads(pickle.dumps(stream))


@pytest.mark.parametrize("copied", [lambda stream: stream, copy.deepcopy, pickled], ids=["itself", "copy", "pickled"])
def test_workers_that_live_on_see_the_next_epoch(folder, copied):
    stream = copied(StreamedShards(folder, all_views=True))
    loader = DataLoader(stream, batch_size=None, num_workers=2, persistent_workers=True)
    orders = []
    for epoch in range(2):
        stream.set_epoch(epoch)
        orders.append(keys_of(loader))
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
