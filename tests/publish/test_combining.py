"""Datasets from datasets: merged, sampled, and exported to Parquet."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from pipeline.attack import dataset as attack_run
from pipeline.core.errors import ParameterError, ShardError, StoreError
from pipeline.core.provenance import ROOT
from pipeline.core.status import Status
from pipeline.publish import parquet as shard_export
from pipeline.publish import rewrite as shard_rewrite
from pipeline.publish.adopt import adopt
from pipeline.publish.merge import merge
from pipeline.publish.parquet import export_parquet
from pipeline.publish.sample import sample
from pipeline.publish.writer import write_shard
from pipeline.shards.check import find_problems
from pipeline.shards.file import read_columns
from pipeline.shards.format import columns_of, shard_name
from pipeline.shards.manifest import read_manifest
from pipeline.shards.reader import BoundaryShards
from pipeline.student.shard_source import ShardSource
from tests.support.files import (
    change_manifest,
    contents,
    finish,
    flip_bit,
    fork_stage,
    make_missing,
    on_full_disk,
    reseal,
    run_stage,
    sample_dataset,
    tiny_splits,
    write_params,
)
from tests.support.helpers import CPU
from tests.support.projects import page_blocks, run_in

NAME = shard_name(1, 2)
A, B = {}, {"attack.seed": 6}

os.environ["HF_HUB_OFFLINE"] = "1"  # is read when Hugging Face's library is imported


def published(folder, name, changes=None, train=None):
    """Make a dataset with a teacher and a store that others in the folder share; publish it under a name."""
    dataset = sample_dataset(folder, train or tiny_splits()["train"], {"attack.targets": 2} | (changes or {}))
    make_missing(dataset, folder)
    dataset.publish(folder / name)
    return folder / name


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Datasets of 2 views, 3 blocks and 2 targets: `a` and `b` of different seeds; `more` is `a` with a third view."""
    folder = tmp_path_factory.mktemp("made")
    for name, changes in {"a": A, "b": B, "more": {"attack.views": 3}}.items():
        published(folder, name, changes)
    return folder


@pytest.fixture
def copy(tmp_path, made):
    """A copy that a test may spoil."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def values_of(directory):
    """All columns by view: (views, rows, ...)."""
    shards = BoundaryShards(directory)
    views = range(shards.manifest.views)
    return {
        name: np.stack(
            [np.concatenate([shards.read(s, [name])[name] for s in shards.shards_of_view(view)]) for view in views]
        )
        for name in shards.manifest.columns
    }


def assert_same_columns(values, expected):
    assert values.keys() == expected.keys()
    for name in expected:
        assert values[name].dtype == expected[name].dtype
        assert np.array_equal(values[name], expected[name]), name


def by_name(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def fingerprint_of(directory):
    return read_manifest(directory).fingerprint


def test_merged_views_are_those_of_the_sources_in_order(tmp_path, made):
    merge([made / "a", made / "b"], tmp_path / "c")
    manifest = read_manifest(tmp_path / "c")
    assert find_problems(tmp_path / "c", manifest) == []
    assert (manifest.views, manifest.rows, manifest.totals.rows) == (4, 64, 256)
    a, b = values_of(made / "a"), values_of(made / "b")
    assert_same_columns(values_of(tmp_path / "c"), {name: np.concatenate([a[name], b[name]]) for name in a})
    statuses = [read_manifest(made / name).totals.statuses for name in ("a", "b")]
    assert Counter(manifest.totals.statuses) == Counter(statuses[0]) + Counter(statuses[1]) + Counter()


def test_a_merged_manifest_says_where_the_views_are_from(tmp_path, made):
    merge([made / "a", made / "b"], tmp_path / "c")
    manifest, source = read_manifest(tmp_path / "c"), read_manifest(made / "a")
    assert manifest.parameters["merged"] == [
        {"fingerprint": fingerprint_of(made / "a"), "seed": 5, "views": [0, 1]},
        {"fingerprint": fingerprint_of(made / "b"), "seed": 6, "views": [0, 1]},
    ]
    attack = dict(source.parameters["attack"])
    del attack["seed"]
    assert manifest.parameters["attack"] == attack
    assert manifest.fingerprint not in (fingerprint_of(made / "a"), fingerprint_of(made / "b"))
    changed = {"fingerprint", "parameters", "views", "shards", "totals"}
    assert manifest.model_dump(exclude=changed) == source.model_dump(exclude=changed)


def test_a_student_sees_every_view_of_a_merged_dataset(tmp_path, made):
    merge([made / "a", made / "b"], tmp_path / "c")
    source = ShardSource(BoundaryShards(tmp_path / "c"), 0, 16, CPU, statuses=(Status.CONVERGED,))
    seen = Counter()
    for epoch in range(4):
        for batch in source.epoch(epoch):
            seen.update(np.rint(image.numpy() * 255).astype(np.uint8).tobytes() for image in batch.images)
    images = np.concatenate([values_of(made / name)["image"].reshape(-1, 64) for name in ("a", "b")])
    assert seen == Counter(image.tobytes() for image in images)


def test_merging_is_deterministic_and_depends_on_the_order(tmp_path, made):
    for name, sources in {"one": "ab", "two": "ab", "other": "ba"}.items():
        merge([made / source for source in sources], tmp_path / name)
    assert by_name(tmp_path / "one") == by_name(tmp_path / "two")
    assert fingerprint_of(tmp_path / "one") != fingerprint_of(tmp_path / "other")
    a, other = values_of(made / "a"), values_of(tmp_path / "other")
    assert_same_columns({name: column[2:] for name, column in other.items()}, a)


def test_a_view_that_is_there_twice_is_taken_once(tmp_path, made):
    merge([made / "a", made / "b", made / "more"], tmp_path / "c")
    manifest = read_manifest(tmp_path / "c")
    sources = [(source["seed"], source["views"]) for source in manifest.parameters["merged"]]
    assert sources == [(5, [0, 1]), (6, [0, 1]), (5, [2])]
    merged, more = values_of(tmp_path / "c"), values_of(made / "more")
    for name, column in merged.items():
        assert np.array_equal(column[4], more[name][2]), name


def test_merging_step_by_step_is_merging_at_once(tmp_path, made):
    merge([made / "a", made / "b", made / "more"], tmp_path / "once")
    merge([made / "a", made / "b"], tmp_path / "first")
    merge([tmp_path / "first", made / "more"], tmp_path / "steps")
    assert by_name(tmp_path / "steps") == by_name(tmp_path / "once")


@pytest.mark.parametrize("sources", [("a", "more"), ("more", "a"), ("more", "more")])
def test_datasets_of_one_fingerprint_stay_that_dataset(tmp_path, made, sources):
    merge([made / source for source in sources], tmp_path / "c")
    shards = {name: content for name, content in by_name(made / "more").items() if name.endswith(".h5")}
    assert {name: content for name, content in by_name(tmp_path / "c").items() if name.endswith(".h5")} == shards
    assert read_manifest(tmp_path / "c") == read_manifest(made / "more")


def merge_refusal(sources, out, error=ShardError):
    """The message with which merging is refused; what is at `out` and beside it stays as it was."""
    before = contents(out.parent)
    with pytest.raises(error) as caught:
        merge(sources, out)
    assert contents(out.parent) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Of parameters that differ: the value of the other dataset, and the value here.
UNLIKE = {
    "search.tolerance": (0.03, 0.02),
    "search.name": ("heo2019", "newton"),
    "attack.targets": (1, 2),
    "search.max_gradients": (5, 20),
    "attack.rows_per_shard": (32, 24),
    "attack.embed_images": (False, True),
    "attack.compression": ("gzip", "none"),
    "views.padding": (2, 1),
    "views.flip": (False, True),
}
# Where a manifest has them, if not under the same name.
NAMES_IN_MANIFESTS = {
    "search.tolerance": "attack.tolerance",
    "search.name": "attack.search",
    "search.max_gradients": "attack.max_gradients",
    "views.padding": "augmentation.padding",
    "views.flip": "augmentation.flip",
}


@pytest.mark.parametrize("key", UNLIKE)
def test_datasets_of_other_parameters_are_refused_by_name(copy, key):
    theirs, ours = UNLIKE[key]
    other = published(copy, "other", {key: theirs, "attack.seed": 6, "attack.views": 1})
    name = NAMES_IN_MANIFESTS.get(key, key)
    assert merge_refusal([copy / "a", other], copy / "c") == (
        f"{other}: parameters.{name} is {json.dumps(theirs)}, but {json.dumps(ours)} in {copy / 'a'}: only views of "
        "the same teacher, data and parameters can be merged"
    )


# Of what the manifest says beside parameters: a change of it, and the start of the refusal.
UNLIKE_FIELDS = {
    "teacher": (lambda values: values["digests"].update(teacher="0" * 64), f'digests.teacher is "{"0" * 64}", but "'),
    "data": (lambda values: values["digests"].update(train="0" * 64), f'digests.train is "{"0" * 64}", but "'),
    "classes": (
        lambda values: values["class_names"].__setitem__(0, "owl"),
        'class_names is ["owl", "cat", "dog", "frog"], but ["bird", "cat", "dog", "frog"] in ',
    ),
    "mean": (lambda values: values.update(mean=[0.5]), "mean is [0.5], but [0."),
    "deviation": (lambda values: values.update(std=[0.5]), "std is [0.5], but [0."),
    "unknown": (lambda values: values["parameters"].update(mine=1), "parameters.mine is 1, but absent in "),
    "absent": (
        lambda values: values["parameters"].pop("augmentation"),
        "parameters.augmentation.flip is absent, but true in ",
    ),
    "long": (lambda values: values["parameters"].update(mine="x" * 999), f'parameters.mine is "{"x" * 99}..., but'),
}


@pytest.mark.parametrize("case", UNLIKE_FIELDS)
def test_datasets_of_another_teacher_or_data_are_refused_by_name(copy, case):
    change, expected = UNLIKE_FIELDS[case]
    change_manifest(copy / "b", change)
    message = merge_refusal([copy / "a", copy / "b"], copy / "c")
    assert message.startswith(f"{copy / 'b'}: {expected}")
    assert f" in {copy / 'a'}: " in message


def test_blocks_of_another_size_are_refused_whatever_parameters_say(copy):
    other = published(copy, "other", {"attack.rows_per_shard": 22, "attack.seed": 6, "attack.views": 1})
    change_manifest(other, lambda values: values["parameters"]["attack"].update(rows_per_shard=24))
    assert f"{other}: rows of the blocks is [22, 22, 20], but [24, 24, 16] in {copy / 'a'}" in merge_refusal(
        [copy / "a", other], copy / "c"
    )


def test_the_same_draw_by_other_code_is_refused(copy, monkeypatch):
    monkeypatch.setattr(attack_run, "code_digest", lambda *modules: "other code")
    shutil.rmtree(copy / "store")
    other = published(copy, "other", A)
    ours, theirs = fingerprint_of(copy / "a"), fingerprint_of(other)
    assert ours != theirs
    assert merge_refusal([copy / "b", copy / "a", other], copy / "c") == (
        f"{other}: fingerprint of view 0 is {theirs}, but {ours} in {copy / 'a'} (view 0): the same draw (seed 5, "
        "view 0) made by other code: make one of them again, with another seed"
    )


def test_another_draw_by_other_code_is_merged(copy, monkeypatch):
    monkeypatch.setattr(attack_run, "code_digest", lambda *modules: "other code")
    other = published(copy, "other", {"attack.seed": 7})
    merge([copy / "a", other], copy / "c")
    assert find_problems(copy / "c", read_manifest(copy / "c")) == []


def test_a_damaged_source_is_named_before_anything_is_written(copy):
    merge([copy / "a", copy / "more"], copy / "c")
    flip_bit(copy / "b" / NAME, 3000)
    assert f"{copy / 'b' / NAME}: its sha256 is not" in merge_refusal([copy / "a", copy / "b"], copy / "c")


def test_shards_of_another_fingerprint_than_the_manifests_are_refused(copy):
    shutil.copy(copy / "a" / NAME, copy / "b" / NAME)
    reseal(copy / "b", NAME)
    assert str(copy / "b" / NAME) in merge_refusal([copy / "a", copy / "b"], copy / "c")


UNKNOWN_SEEDS = {
    "absent": lambda values: values["parameters"]["attack"].pop("seed"),
    "of fewer views": lambda values: values["parameters"].update(
        merged=[{"fingerprint": "0" * 64, "seed": 1, "views": [0]}]
    ),
    "text": lambda values: values["parameters"]["attack"].update(seed="five"),
    "no attack": lambda values: values["parameters"].pop("attack"),
    "compression": lambda values: values["parameters"]["attack"].update(compression="szip"),
}


@pytest.mark.parametrize("case", UNKNOWN_SEEDS)
def test_a_manifest_that_does_not_say_how_views_were_drawn_is_refused(copy, case):
    for name in ("a", "b"):
        change_manifest(copy / name, UNKNOWN_SEEDS[case])
    message = merge_refusal([copy / "a", copy / "b"], copy / "c")
    assert message.startswith(f"{copy / 'a/manifest.json'}: parameters")


def test_one_dataset_is_nothing_to_merge(copy):
    message = merge_refusal([copy / "a"], copy / "c", ParameterError)
    assert message == "merge: expected two or more datasets, got 1"


@pytest.mark.parametrize("out", ["a", "b", "link"])
def test_a_source_is_not_written_over(copy, out):
    (copy / "link").symlink_to(copy / "b")
    assert "is, holds or is within what is read here" in merge_refusal([copy / "a", copy / "b"], copy / out, StoreError)


def test_a_folder_of_somebody_else_is_not_replaced(copy):
    (copy / "c").mkdir()
    (copy / "c/thesis.tex").write_text("years")
    assert "holds 'thesis.tex'" in merge_refusal([copy / "a", copy / "b"], copy / "c", StoreError)
    before = contents(copy)
    for function in (lambda: sample(copy / "a", 5, 0, copy / "c"), lambda: export_parquet(copy / "a", copy / "c")):
        with pytest.raises(StoreError, match=r"holds 'thesis\.tex'"):
            function()
    assert contents(copy) == before


def test_a_published_dataset_with_its_card_is_replaced(copy):
    (copy / "c").mkdir()
    for name in ("README.md", "croissant.json", "manifest.json", shard_name(9, 9)):
        (copy / "c" / name).write_text("old")
    merge([copy / "a", copy / "b"], copy / "c")
    assert sorted(by_name(copy / "c")) == [
        "README.md",
        "croissant.json",
        "manifest.json",
        *(shard_name(view, block) for view in range(4) for block in range(3)),
    ]


COMMANDS = {
    "merge": ["merge", "a", "b", "--out", "c"],
    "sample": ["sample", "a", "-n", "60", "--out", "c"],
    "export": ["export", "a", "--out", "c"],
}


@pytest.fixture
def with_c(copy):
    """Something older at `c`, which each command may replace: a manifest alone."""
    (copy / "c").mkdir()
    (copy / "c/manifest.json").write_text("{}")
    return copy


@pytest.mark.faults
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_leaves_what_was_there(with_c, monkeypatch, command):
    monkeypatch.chdir(with_c)
    before = contents(with_c)

    def outcome():
        result = run_stage("shards", *COMMANDS[command])
        return result.exit_code, result.stderr

    code, message = on_full_disk(outcome, limit=5_000)
    assert code == 1
    assert message.startswith("error: ")
    assert "no space to write it" in message
    assert message.count("\n") == 1
    shutil.rmtree(with_c / ".work")
    assert contents(with_c) == before
    assert not list(with_c.glob(".c.*"))


def kill_at_call(module, name, number):
    """This process ends, as by kill -9, when a function is called for that time."""
    function, calls = getattr(module, name), []

    def counted(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    setattr(module, name, counted)


@pytest.mark.faults
@pytest.mark.parametrize("point", ["write_shard", "write_atomically"])
def test_a_killed_merge_leaves_what_was_there_and_can_be_run_again(with_c, monkeypatch, point):
    before = contents(with_c)
    number = 5 if point == "write_shard" else 1
    process = fork_stage(
        with_c, "shards", *COMMANDS["merge"], before=lambda: kill_at_call(shard_rewrite, point, number)
    )
    assert finish(process)[0] == -signal.SIGKILL
    assert {path: digest for path, digest in contents(with_c).items() if "/." not in path} == before
    monkeypatch.chdir(with_c)
    assert run_stage("shards", *COMMANDS["merge"]).exit_code == 0
    assert run_stage("shards", "verify", "c").exit_code == 0
    assert not list(with_c.glob(".c.*"))


def test_a_sample_is_rows_of_the_dataset_and_a_dataset_itself(tmp_path, made):
    sample(made / "a", 40, 0, tmp_path / "s")
    manifest = read_manifest(tmp_path / "s")
    assert find_problems(tmp_path / "s", manifest) == []
    assert (manifest.views, manifest.rows, manifest.totals.rows) == (1, 40, 40)
    assert [shard.rows for shard in manifest.shards] == [24, 16]
    drawn = np.sort(np.random.default_rng(0).choice(128, 40, replace=False))
    whole = {name: column.reshape(128, *column.shape[2:]) for name, column in values_of(made / "a").items()}
    expected = {name: column[drawn] for name, column in whole.items()}
    values = {name: column[0] for name, column in values_of(tmp_path / "s").items()}
    assert_same_columns(values, expected)
    shards = BoundaryShards(tmp_path / "s")
    assert [int(row["index"]) for row in shards] == (drawn % 64).tolist()


def test_a_sample_says_what_it_is(tmp_path, made):
    sample(made / "a", 7, 3, tmp_path / "s")
    source, manifest = read_manifest(made / "a"), read_manifest(tmp_path / "s")
    fingerprint = source.fingerprint
    assert manifest.parameters == source.parameters | {"sample": {"fingerprint": fingerprint, "rows": 7, "seed": 3}}
    assert manifest.fingerprint != fingerprint
    assert manifest.digests == source.digests


def test_a_sample_is_reproducible(tmp_path, made):
    for name, seed in {"one": 0, "two": 0, "other": 1}.items():
        sample(made / "a", 30, seed, tmp_path / name)
    assert by_name(tmp_path / "one") == by_name(tmp_path / "two")
    assert fingerprint_of(tmp_path / "one") != fingerprint_of(tmp_path / "other")
    assert not np.array_equal(values_of(tmp_path / "one")["index"], values_of(tmp_path / "other")["index"])


@pytest.mark.parametrize("rows", [1, 128])
def test_one_row_and_all_rows_can_be_drawn(tmp_path, made, rows):
    sample(made / "a", rows, 0, tmp_path / "s")
    assert len(BoundaryShards(tmp_path / "s")) == rows


@pytest.mark.parametrize(("rows", "seed", "option"), [(0, 0, "-n"), (129, 0, "-n"), (-5, 0, "-n"), (5, -1, "--seed")])
def test_rows_and_seeds_out_of_range_are_refused(tmp_path, made, rows, seed, option):
    with pytest.raises(ParameterError, match=f"^{option}: expected .*, got {min(rows, seed) if seed else rows}$"):
        sample(made / "a", rows, seed, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_sample_does_not_replace_what_it_is_drawn_from(copy):
    before = contents(copy)
    with pytest.raises(StoreError, match="is, holds or is within what is read here"):
        sample(copy / "a", 5, 0, copy / "a")
    assert contents(copy) == before


def test_a_sample_of_a_damaged_dataset_is_refused(copy):
    flip_bit(copy / "a" / NAME, 3000)
    with pytest.raises(ShardError, match=f"{NAME}: its sha256 is not"):
        sample(copy / "a", 128, 0, copy / "s")
    assert not (copy / "s").exists()


def test_a_sample_is_not_taken_for_a_whole_dataset(copy):
    sample(copy / "a", 10, 0, copy / "s")
    expected = f"{copy / 's'}: is a sample of another dataset (10 rows)"
    assert expected in merge_refusal([copy / "a", copy / "s"], copy / "c")
    with pytest.raises(ShardError, match="is a sample of another dataset"):
        sample(copy / "s", 5, 0, copy / "c")


def test_an_adopted_sample_is_nothing_that_the_attack_builds_on(copy):
    dataset = sample_dataset(copy, tiny_splits()["train"], {"attack.targets": 2, "attack.views": 4})
    before = dataset.missing()
    sample(copy / "a", 30, 0, copy / "s")
    assert adopt(copy / "s", read_manifest(copy / "s"), dataset.store) == 2
    assert dataset.missing() == before
    assert len(before) == 3


def test_a_sample_of_a_merged_dataset_keeps_where_it_is_from(copy):
    merge([copy / "a", copy / "b"], copy / "c")
    sample(copy / "c", 50, 0, copy / "s")
    parameters = read_manifest(copy / "s").parameters
    assert [source["seed"] for source in parameters["merged"]] == [5, 6]
    assert parameters["sample"]["fingerprint"] == fingerprint_of(copy / "c")


def test_shards_without_images_are_merged_and_sampled(copy):
    changes = {"attack.embed_images": False, "attack.views": 1, "attack.compression": "gzip"}
    sources = [published(copy, f"no images {seed}", changes | {"attack.seed": seed}) for seed in (5, 6)]
    merge(sources, copy / "c")
    sample(copy / "c", 70, 0, copy / "s")
    train = tiny_splits()["train"]
    source = ShardSource(BoundaryShards(copy / "s"), 0, 16, CPU, statuses=(Status.CONVERGED,), train=train)
    assert sum(len(batch.labels) for batch in source.epoch(0)) == 70


def plain(array):
    """A column of Arrow as numpy has it: (N, ...), without conversion of its values."""
    array = array.combine_chunks() if isinstance(array, pyarrow.ChunkedArray) else array
    array = array.storage if isinstance(array, pyarrow.ExtensionArray) else array
    assert array.null_count == 0
    shape = [len(array)]
    while pyarrow.types.is_list(array.type) or pyarrow.types.is_fixed_size_list(array.type):
        rows, array = len(array), array.flatten()
        shape.append(len(array) // rows)
    return array.to_numpy(zero_copy_only=True).reshape(shape)


def stored(directory, view, block):
    """The columns of a shard, as stored."""
    manifest = read_manifest(directory)
    values = read_columns(directory / shard_name(view, block), manifest.columns)
    return {name: values[name].astype(column.dtype) for name, column in manifest.columns.items()}


def assert_same_bits(values, expected):
    for name, column in expected.items():
        assert values[name].dtype == column.dtype, name
        assert values[name].shape == column.shape, name
        assert values[name].tobytes() == column.tobytes(), name


def extreme_shards(made, folder):
    """A dataset whose image and delta go through all their bits, and whose floats include -0 and subnormals."""
    shutil.copytree(made / "a", folder)
    manifest = read_manifest(folder)
    columns = columns_of(manifest.image_shape, 4, 2, True)
    values = stored(folder, 0, 0)
    generator = np.random.default_rng(0)
    values["image"] = generator.integers(0, 256, values["image"].shape, np.uint8)
    values["delta"] = generator.integers(-128, 128, values["delta"].shape, np.int8)
    converged = values["status"] == 0
    values["status"][converged] = 2  # whose delta may be anything
    values["teacher_logits"][0] = [-0.0, 1e-45, np.finfo(np.float32).max, np.nextafter(np.float32(1), 2)]
    name = shard_name(0, 0)
    attributes = {"fingerprint": manifest.fingerprint, "view": 0, "block": 0}
    write_shard(folder / name, values, columns, **attributes, compression="none")
    count = int(converged.sum())

    def recount(manifest):
        for statuses in (manifest["shards"][0]["statuses"], manifest["totals"]["statuses"]):
            statuses["converged"] -= count
            statuses["not_converged"] += count

    change_manifest(folder, recount)
    reseal(folder, name)
    return folder


def test_an_export_has_every_bit_of_every_column(tmp_path, made):
    source = extreme_shards(made, tmp_path / "source")
    export_parquet(source, tmp_path / "p")
    names = [shard_name(view, block).replace(".h5", ".parquet") for view in range(2) for block in range(3)]
    assert sorted(by_name(tmp_path / "p")) == ["manifest.json", *names]
    assert (tmp_path / "p/manifest.json").read_bytes() == (source / "manifest.json").read_bytes()
    for number, name in enumerate(names):
        table = parquet.read_table(tmp_path / "p" / name)
        view, block = divmod(number, 3)
        expected = stored(source, view, block)
        values = {column: plain(table[column]) for column in table.column_names}
        assert table.column_names == ["view", *columns_of((1, 8, 8), 4, 2, True)]
        assert_same_bits(values, expected)
        assert (values["view"] == view).all()
        assert json.loads(table.schema.metadata[b"shard"]) == {
            "format_version": 1,
            "fingerprint": fingerprint_of(source),
            "view": view,
            "block": block,
        }


def load_parquet(folder, files=None):
    """The files as Hugging Face's library reads them."""
    import datasets

    arguments = {"path": str(folder)} if files is None else {"path": "parquet", "data_files": f"{folder}/{files}"}
    return datasets.load_dataset(**arguments, split="train", cache_dir=str(folder.with_name("cache")))


@pytest.mark.parametrize("files", ["*.parquet", None])
def test_hugging_faces_library_reads_arrays_of_the_right_shape_and_dtype(tmp_path, made, files):
    source = extreme_shards(made, tmp_path / "source")
    export_parquet(source, tmp_path / "p")
    loaded = load_parquet(tmp_path / "p", files)
    shards = [stored(source, view, block) for view in range(2) for block in range(3)]
    expected = {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}
    arrow = loaded.with_format("arrow")[:]
    assert_same_bits({name: plain(arrow[name]) for name in expected}, expected)
    assert plain(arrow["view"]).tolist() == [0] * 64 + [1] * 64

    rows = loaded.with_format("numpy")[:]
    for name, column in expected.items():
        assert np.array_equal(rows[name], column), name
        assert rows[name].shape == column.shape
    assert np.array_equal(loaded.with_format("torch")[3]["delta"], expected["delta"][3])
    assert loaded.features["image"].shape == (1, 8, 8)
    assert loaded.features["image"].dtype == "uint8"
    assert loaded.features["delta"].shape == (2, 1, 8, 8)
    assert loaded.features["label"].names == ["bird", "cat", "dog", "frog"]


def test_plain_pyarrow_reads_an_export_without_hugging_faces_library(tmp_path, made):
    export_parquet(made / "a", tmp_path / "p")
    path = tmp_path / "p" / shard_name(1, 2).replace(".h5", ".parquet")
    code = (
        "import sys, pyarrow.parquet as parquet\n"
        f"table = parquet.read_table({str(path)!r})\n"
        "assert 'datasets' not in sys.modules\n"
        "print(table.schema.field('image').type, table['image'][3].as_py())"
    )
    result = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    image = stored(made / "a", 1, 2)["image"][3].tolist()
    assert result.stdout.strip() == f"list<element: list<element: list<element: uint8>>> {image}"


@pytest.mark.parametrize("name", ["merged", "sampled", "no images"])
def test_all_kinds_of_datasets_are_exported(copy, name):
    merge([copy / "a", copy / "b"], copy / "merged")
    sample(copy / "merged", 30, 0, copy / "sampled")
    changes = {"attack.embed_images": False, "attack.views": 1, "attack.targets": 1, "attack.compression": "gzip"}
    published(copy, "no images", changes)
    manifest = export_parquet(copy / name, copy / "p")
    for shard in manifest.shards:
        table = parquet.read_table((copy / "p" / shard.name).with_suffix(".parquet"))
        values = {column: plain(table[column]) for column in table.column_names}
        assert_same_bits(values, stored(copy / name, shard.view, shard.block))


def test_an_export_is_the_same_bytes_again(tmp_path, made):
    for name in ("one", "two"):
        export_parquet(made / "a", tmp_path / name)
    assert by_name(tmp_path / "one") == by_name(tmp_path / "two")


def test_a_damaged_dataset_is_not_exported(with_c):
    flip_bit(with_c / "a" / NAME, 3000)
    before = contents(with_c)
    with pytest.raises(ShardError, match=f"{NAME}: its sha256 is not"):
        export_parquet(with_c / "a", with_c / "c")
    assert contents(with_c) == before


def test_a_shard_that_is_too_large_for_arrow_is_refused(tmp_path, made, monkeypatch):
    monkeypatch.setattr(shard_export, "LARGEST_COLUMN", 24 * 2 * 8 * 8 - 1)
    with pytest.raises(ShardError, match=r"view-000-block-00000\.h5: column 'delta' has more than 3071 numbers"):
        export_parquet(made / "a", tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_a_dataset_is_not_replaced_by_its_export(copy):
    with pytest.raises(StoreError, match=r"holds 'README\.md', which is not written here"):
        export_parquet(copy / "a", copy / "a")


def test_an_export_without_pyarrow_says_how_to_get_it(copy, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.chdir(copy)
    result = run_stage("shards", "export", "a", "--out", "p")
    assert result.exit_code == 1
    assert result.stderr == "error: pyarrow is not installed: pip install '.[parquet]'\n"
    assert not (copy / "p").exists()


def test_commands_tell_in_one_line_what_they_wrote(copy, monkeypatch):
    monkeypatch.chdir(copy)
    lines = {}
    for command in (
        COMMANDS["merge"],
        ["sample", "c", "-n", "30", "--seed", "4", "--out", "s"],
        ["export", "s", "--to", "parquet", "--out", "p"],
    ):
        result = run_stage("shards", *command)
        assert result.exit_code == 0, result.stderr
        assert result.stderr == ""
        lines[command[0]] = result.stdout
    assert lines["merge"].startswith("wrote c: 4 views of 2 datasets, 12 shards, 512 samples, ")
    assert lines["sample"].startswith("wrote s: 30 rows of c, 2 shards, ")
    assert lines["export"].startswith("wrote p: 2 files, 30 rows, ")
    assert all(line.endswith(" MB\n") and line.count("\n") == 1 for line in lines.values())
    assert read_manifest(copy / "s").parameters["sample"]["seed"] == 4


def test_info_tells_a_sample_and_a_merged_dataset_from_others(copy, monkeypatch):
    monkeypatch.chdir(copy)
    run_stage("shards", *COMMANDS["merge"])
    run_stage("shards", "sample", "a", "-n", "30", "--out", "s")
    facts = run_stage("shards", "info", "s").stdout
    assert 'sample                    {"fingerprint": "' in facts
    assert "rows                      30, drawn from all views\n" in facts
    assert not re.search(r"^(training images|views)", facts, re.MULTILINE)
    assert "training images           64\nviews                     4\n" in run_stage("shards", "info", "c").stdout
    assert 'merged                    [{"fingerprint": "' in run_stage("shards", "info", "c").stdout
    assert "merged" not in run_stage("shards", "info", "a").stdout


def test_names_of_a_stranger_are_shown_in_one_line(copy, monkeypatch):
    monkeypatch.chdir(copy)
    change_manifest(copy / "a", lambda values: values["class_names"].__setitem__(0, "owl\n\x1b[2J"))
    facts = run_stage("shards", "info", "a").stdout
    assert "4: owl\\n\\x1b[2J, cat, dog, frog\n" in facts
    assert facts.isascii()
    change_manifest(copy / "b", lambda values: values["parameters"].update({"a\nb\x1b[2J": 1}))
    assert f"{copy / 'b'}: parameters.a\\nb\\x1b[2J is 1, but absent in" in merge_refusal(
        [copy / "more", copy / "b"], copy / "c"
    )


def test_refusals_of_commands_are_one_line(copy, monkeypatch):
    monkeypatch.chdir(copy)
    for command, code in ((["merge", "a", "--out", "c"], 2), (["sample", "a", "-n", "0", "--out", "c"], 2)):
        result = run_stage("shards", *command)
        assert result.exit_code == code
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
    assert not (copy / "c").exists()


def test_the_command_starts_without_torch_and_pyarrow():
    code = "import stages.shards, sys; print({'torch', 'pyarrow', 'datasets', 'pandas'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    assert result.stdout == "set()\n"


def test_the_commands_of_the_page_merge_sample_and_export(copy):
    page = ROOT / "docs/SHARING.md"
    (copy / "data").mkdir()
    (copy / "a").rename(copy / "data/bss")
    (copy / "b").rename(copy / "from-ann")
    printed = {}
    for heading in ("Views from several people", "A preview", "Parquet"):
        for block in page_blocks(page)[heading]:
            code, printed[heading] = run_in(copy, ["bash", "-ec", block], {"PYTHONPATH": str(ROOT)})
            assert code == 0, printed[heading]
    assert "merged " in printed["Views from several people"]
    assert "data/preview: whole, 3 shards, 100 samples" in printed["A preview"]
    assert "wrote data/parquet: 12 files, 256 rows" in printed["Parquet"]
    example = page.read_text().split("<!-- example: Hugging Face -->\n```python\n")[1].split("```")[0]
    code, output = run_in(
        copy, [sys.executable, "-c", example], {"PYTHONPATH": str(ROOT), "HF_HOME": str(copy / "hub")}
    )
    assert code == 0, output
    assert "Array3D(shape=(1, 8, 8), dtype='uint8') int8 (2, 1, 8, 8)" in output


@pytest.mark.parametrize("name", ["train.h5", "mine.parquet", "README.md"])
def test_a_folder_of_other_files_is_not_replaced(copy, name):
    other = copy / "other"
    other.mkdir()
    (other / name).write_text("mine")
    for arguments in (
        ("merge", copy / "a", copy / "b", "--out", other),
        ("sample", copy / "a", "-n", 5, "--out", other),
        ("export", copy / "a", "--out", other),
    ):
        result = run_stage("shards", *arguments)
        assert result.exit_code == 1
        assert f"{other}: holds '{name}', which is not written here: choose another folder" in result.stderr
        assert (other / name).read_text() == "mine"


@pytest.mark.parametrize("how", ["merge", "sample"])
def test_a_card_states_what_the_parameters_say(copy, how):
    write_params(copy / "params.yaml", {"card.licence": "CC-BY-4.0", "card.source": "somewhere"})
    inputs = (copy / "a", copy / "b") if how == "merge" else (copy / "a", "-n", 5)
    result = run_stage("shards", how, *inputs, "--out", copy / "new", "--params", copy / "params.yaml")
    assert result.exit_code == 0, result.stderr
    card = (copy / "new/README.md").read_text()
    assert "CC-BY-4.0" in card
    assert "somewhere" in card


@pytest.mark.parametrize("how", ["merged", "sample"])
def test_what_was_put_together_is_not_adopted(copy, monkeypatch, how):
    monkeypatch.chdir(copy)
    if how == "merged":
        merge([copy / "a", copy / "b"], copy / "new")
    else:
        sample(copy / "a", 5, 0, copy / "new")
    result = run_stage("shards", "adopt", "new")
    assert result.exit_code == 1
    assert f"new: was put together ('{how}')" in result.stderr
