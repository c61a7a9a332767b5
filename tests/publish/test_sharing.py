"""A sample dataset through a DVC remote to others, by the commands of docs/SHARING.md."""

import hashlib
import shutil
from pathlib import Path
from typing import NamedTuple

import boto3
import pytest
from moto.server import ThreadedMotoServer

from pipeline.core.files import file_digest
from pipeline.core.provenance import ROOT
from tests.support.files import change_manifest, flip_bit
from tests.support.projects import change_params, commit, digests, dvc, git, new_project, page_blocks, repro, run_in

PAGE = page_blocks(ROOT / "docs/SHARING.md")

# Headings whose blocks tests/test_combining.py runs.
ELSEWHERE = {"Views from several people", "A preview", "Parquet"}

SHARDS = [f"view-00{view}-block-0000{block}.h5" for view in (0, 1) for block in (0, 1)]

BUCKET = "samples"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1",
}


class Shared(NamedTuple):
    """A published project, and what the page's commands need to know of it."""

    origin: Path
    """The publisher's project."""
    variables: dict[str, str]
    """Of the environment."""

    def run(self, directory, block, code=0):
        """What a block of the page prints, which must end with an exit code."""
        # The code of the publisher stands for the installed project where there is no clone.
        given, output = run_in(
            directory, ["bash", "-euo", "pipefail", "-c", block], self.variables | {"PYTHONPATH": str(self.origin)}
        )
        assert given == code, output
        return output

    def clone(self, directory):
        git(directory.parent, "clone", "-q", self.variables["REPO"], directory.name)
        return directory


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A project with a sample dataset: 2 views of 2 blocks."""
    directory = tmp_path_factory.mktemp("built") / "project"
    new_project(
        directory,
        {
            "dataset.train_images": 300,
            "teacher.network": "resnet8w4",
            "teacher.training.epochs": 6,
            "teacher.training.batch_size": 16,
            "attack.views": 2,
            "attack.rows_per_shard": 150,
            "seeds": 1,
            "training.epochs": 1,
            "runtime.device": "cpu",
            "runtime.threads": 1,
            "runtime.workers": 1,
        },
    )
    repro(directory, "attack")
    commit(directory)
    assert digests(directory / "data/bss").keys() >= set(SHARDS)
    return directory


@pytest.fixture(scope="module")
def endpoint():
    """A server on this machine that speaks S3, with an empty bucket."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    client = boto3.client(
        "s3",
        endpoint_url=address,
        region_name=CREDENTIALS["AWS_DEFAULT_REGION"],
        aws_access_key_id="nobody",
        aws_secret_access_key="nothing",
    )
    client.create_bucket(Bucket=BUCKET)
    yield address
    server.stop()


@pytest.fixture(scope="module", params=["directory", "s3"])
def shared(request, built, tmp_path_factory):
    """The project, published."""
    return publish(built, tmp_path_factory.mktemp(request.param), request.param, request)


@pytest.fixture(scope="module")
def in_directory(request, built, tmp_path_factory):
    """The project, published to a directory that a test may damage."""
    return publish(built, tmp_path_factory.mktemp("damaged"), "directory", request)


def publish(built, directory, kind, request):
    repository, origin = directory / "repository", directory / "origin"
    shutil.copytree(built, origin)
    git(directory, "clone", "-q", "--bare", built, repository)
    git(origin, "remote", "add", "origin", repository)
    git(origin, "push", "-q", "--set-upstream", "origin", "HEAD")
    variables = CREDENTIALS | {
        "HOME": str(directory),  # without the settings of whoever runs the tests
        "REPO": str(repository),
        "REMOTE": str(directory / "remote"),
    }
    if kind == "s3":
        variables |= {"REMOTE": f"s3://{BUCKET}/digits", "ENDPOINT": request.getfixturevalue("endpoint")}
    published = Shared(origin, variables)
    (add,), (set_endpoint,), (send,) = PAGE["Publish"], PAGE["An S3 server"], PAGE["Send"]
    published.run(origin, add)
    if kind == "s3":
        published.run(origin, set_endpoint)
    published.run(origin, send)
    return published


def test_all_commands_of_the_page_are_run():
    here = {
        "Publish",
        "An S3 server",
        "Send",
        "In a clone",
        "One shard",
        "A copy without a clone",
        "In another DVC project",
        "Check",
        "Ask the teacher again",
        "Mend",
        "Train",
        "Build on it",
    }
    assert PAGE.keys() == here | ELSEWHERE


@pytest.mark.pipeline
def test_a_clone_a_copy_and_an_import_are_what_was_published_and_follow_it(shared, tmp_path):
    first = digests(shared.origin / "data/bss")
    fetch, fetch_again = PAGE["In a clone"]
    clone = tmp_path / "clone"
    assert "whole, 4 shards" in shared.run(tmp_path, fetch)
    assert digests(clone / "data/bss") == first

    copy, one_shard = PAGE["A copy without a clone"]
    (tmp_path / "copy").mkdir()
    assert "whole, 4 shards" in shared.run(tmp_path / "copy", copy)
    assert digests(tmp_path / "copy/data/bss") == first
    assert (tmp_path / "copy/params.yaml").read_bytes() == (shared.origin / "params.yaml").read_bytes()
    shared.run(tmp_path / "copy", one_shard)
    assert file_digest(tmp_path / "copy" / SHARDS[0]) == first[SHARDS[0]]

    other = tmp_path / "other"
    git(tmp_path, "init", "-q", other)
    dvc(other, "init", "-q")
    take, update = PAGE["In another DVC project"]
    assert "whole, 4 shards" in shared.run(other, take)
    assert digests(other / "data/bss") == first

    change_params(shared.origin, {"attack.views": 3})
    assert "(2 computed, 4 reused)" in repro(shared.origin, "attack")
    (send,) = PAGE["Send"]
    second = digests(shared.origin / "data/bss")
    assert {name: second[name] for name in SHARDS} == {name: first[name] for name in SHARDS}
    new = len(set(second.values()) - set(first.values())) + 1  # and the list of the folder
    assert f"{new} files pushed" in shared.run(shared.origin, send)
    assert "whole, 6 shards" in shared.run(clone, fetch_again)
    assert digests(clone / "data/bss") == second
    assert "whole, 6 shards" in shared.run(other, update)
    assert digests(other / "data/bss") == second


@pytest.mark.pipeline
def test_one_shard_alone(shared, tmp_path):
    clone = shared.clone(tmp_path / "clone")
    published = digests(shared.origin / "data/bss")
    shard, manifest = PAGE["One shard"]
    shared.run(clone, shard)
    assert digests(clone / "data/bss") == {SHARDS[0]: published[SHARDS[0]]}
    assert "manifest.json: cannot be read" in shared.run(clone, "python -m stages.shards verify data/bss", code=1)

    said = shared.run(clone, manifest, code=1)
    for name in SHARDS[1:]:
        assert f"{name}: missing" in said
    assert SHARDS[0] not in said
    for command in ("shards info data/bss", "shards adopt data/bss", "student --student resnet8w2 --method bss"):
        assert f"{SHARDS[1]}: missing" in shared.run(clone, f"python -m stages.{command}", code=1)
    shared.run(clone, "dvc pull data/bss")
    assert digests(clone / "data/bss") == published


@pytest.mark.pipeline
@pytest.mark.parametrize("shared", ["s3"], indirect=True)
def test_without_credentials_nothing_comes_and_dvc_says_why(shared, tmp_path):
    clone = shared.clone(tmp_path / "clone")
    said = shared.run(clone, "unset AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY; dvc pull data/bss", code=1)
    assert "Unable to locate credentials" in said
    assert not (clone / "data/bss").exists()


def in_remote(shared, name):
    """Where DVC keeps a file of the dataset."""
    md5 = hashlib.md5((shared.origin / "data/bss" / name).read_bytes()).hexdigest()
    return Path(shared.variables["REMOTE"], "files/md5", md5[:2], md5[2:])


def damage(path):
    path.chmod(0o644)
    flip_bit(path, position=path.stat().st_size // 2)


@pytest.mark.pipeline
def test_a_flipped_byte_passes_dvc_and_not_verify(in_directory, tmp_path):
    name = "view-001-block-00000.h5"
    damage(in_remote(in_directory, name))
    unnoticed, noticed = PAGE["Check"]
    clone = in_directory.clone(tmp_path / "clone")
    said = in_directory.run(clone, unnoticed, code=1)
    assert " fetched" in said  # so DVC ended well, and the next command was reached
    assert f"{name}: its sha256 is not the manifest's" in said
    assert "1 problem\n" in said

    careful = in_directory.clone(tmp_path / "careful")
    said = in_directory.run(careful, noticed, code=1)
    assert "failed to pull" in said
    assert name not in said
    assert not (careful / "data/bss").exists()

    publisher_verifies(in_directory)
    (tmp_path / "copy").mkdir()
    (copy, _), (take, _) = PAGE["A copy without a clone"], PAGE["In another DVC project"]
    assert name in in_directory.run(tmp_path / "copy", copy, code=1)
    assert damaged(in_directory, tmp_path / "copy") == [name]
    git(tmp_path, "init", "-q", "other")
    dvc(tmp_path / "other", "init", "-q")
    assert name in in_directory.run(tmp_path / "other", take, code=1)
    assert damaged(in_directory, tmp_path / "other") == [name]

    assert "up to date" in in_directory.run(in_directory.origin, "dvc push data/bss")
    mend_remote, mend_clone = PAGE["Mend"]
    in_directory.run(in_directory.origin, mend_remote)
    assert "up to date" in in_directory.run(clone, "dvc pull data/bss")
    assert damaged(in_directory, clone) == [name]
    assert "whole, 4 shards" in in_directory.run(clone, mend_clone)
    assert damaged(in_directory, clone) == []
    assert "fetched" in in_directory.run(careful, "dvc pull data/bss")
    assert damaged(in_directory, careful) == []


def publisher_verifies(shared):
    shared.run(shared.origin, "dvc remote modify samples verify true; git commit -qam verify; git push -q")


def damaged(shared, directory):
    """Names of the files that are not as they were published."""
    fetched = digests(directory / "data/bss")
    return [name for name, digest in digests(shared.origin / "data/bss").items() if fetched[name] != digest]


@pytest.mark.pipeline
def test_a_file_gone_from_the_remote_is_not_pushed_again(in_directory, tmp_path):
    path = in_remote(in_directory, SHARDS[0])
    path.unlink()
    assert "up to date" in in_directory.run(in_directory.origin, "dvc push data/bss")
    assert not path.exists()
    clone = in_directory.clone(tmp_path / "clone")
    in_directory.run(clone, "dvc pull data/bss", code=1)
    shutil.copy(in_directory.origin / "data/bss" / SHARDS[0], path)
    in_directory.run(clone, "dvc pull data/bss")


@pytest.mark.pipeline
def test_an_import_over_the_stage_that_makes_the_samples_is_refused(in_directory, tmp_path):
    clone = in_directory.clone(tmp_path / "clone")
    said = in_directory.run(clone, 'dvc import "$REPO" data/bss --out data/bss', code=1)
    assert "already specified in stage: 'attack'" in said


@pytest.mark.pipeline
def test_verify_vouches_for_samples_alone(built, tmp_path):
    """What the page says that it does not find."""
    directory = shutil.copytree(built / "data/bss", tmp_path / "bss")
    (directory / "README.md").write_text("Other words.")
    change_manifest(directory, lambda values: values["parameters"]["attack"].update(seed=7))
    assert "whole, 4 shards" in Shared(built, {}).run(tmp_path, "python -m stages.shards verify bss")


@pytest.mark.pipeline
def test_the_teacher_says_again_what_it_said(built):
    (ask,) = PAGE["Ask the teacher again"]
    said = Shared(built, {}).run(built, ask)
    assert "asked about 442 of 442 rows, in 4 of 4 shards" in said
    assert "asked about 100 of 442 rows, in 4 of 4 shards" in said


@pytest.mark.pipeline
def test_students_train_from_samples_and_parameters_alone(built, tmp_path):
    shutil.copytree(built / "data/bss", tmp_path / "data/bss")
    shutil.copy(built / "params.yaml", tmp_path)
    here = Shared(built, {})
    (train,) = PAGE["Train"]
    here.run(tmp_path, train)
    for method in ("hinton", "bss"):
        assert (tmp_path / f"models/students/resnet8w2-{method}/seed-0.safetensors").is_file()
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["bss"]
    for method in ("original", "bss_online"):
        said = here.run(tmp_path, f"python -m stages.student --student resnet8w2 --method {method}", code=1)
        assert said.startswith("error: data/prepared/train.h5: no such prepared file")
        assert said.count("\n") == 1
        assert not (tmp_path / f"models/students/resnet8w2-{method}").exists()


@pytest.mark.pipeline
def test_more_views_build_on_adopted_ones(in_directory, tmp_path):
    clone = in_directory.clone(tmp_path / "clone")
    before = digests(in_directory.origin / "data/bss")
    (build,) = PAGE["Build on it"]
    said = in_directory.run(clone, build)
    assert "> python -m stages.teacher" not in said
    assert "4 shards are new in the store" in said
    assert "(2 computed, 4 reused)" in said
    after = digests(clone / "data/bss")
    assert {name: after[name] for name in SHARDS} == {name: before[name] for name in SHARDS}
