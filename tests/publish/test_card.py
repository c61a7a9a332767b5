"""The card of a published dataset: what it says is so, in Markdown, YAML and JSON-LD, whatever its maker states."""

import io
import json
import re
import shutil

import h5py
import mlcroissant
import numpy as np
import pytest
from huggingface_hub import DatasetCard
from ruamel.yaml import YAML

from pipeline.core.errors import ParameterError, ShardError
from pipeline.core.files import file_digest
from pipeline.core.parameters import Card, check_params
from pipeline.core.status import Status
from pipeline.publish.card import (
    CROISSANT,
    EMPTY_CARD,
    QUANTILES,
    README,
    SIZES,
    croissant_card,
    readme_text,
    write_card,
)
from pipeline.publish.merge import merge_datasets
from pipeline.publish.sample import sample_rows
from pipeline.search.boundary import probability_margin
from pipeline.shards.format import shard_name
from pipeline.shards.manifest import read_manifest
from pipeline.shards.quantiles import quantiles_of
from pipeline.shards.reader import BoundaryShards
from tests.support.files import (
    ROOT,
    change_manifest,
    make_missing,
    make_project,
    mislabelled,
    relabelled,
    run_stage,
    sample_dataset,
    tiny_splits,
    tiny_values,
)

STATED = Card(
    title="Tiny birds",
    licence="CC-BY-SA-4.0",
    source="Birds by me, https://example.org/~me/birds_1?a=1&b=2.",
    terms="For birds only",
    url="https://example.org/tiny-birds",
)
LONGEST_EXAMPLE = 8  # lines that are not empty


def made_in(directory, changes=None):
    """A dataset of 64 tiny images under 2 views with 2 targets, five images wrong; its shards are in the store."""
    dataset = sample_dataset(directory, mislabelled(tiny_splits()["train"]), {"attack.targets": 2} | (changes or {}))
    make_missing(dataset, directory)
    return dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return made_in(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def stated(tmp_path_factory, dataset):
    """The published dataset with a card that states everything."""
    directory = tmp_path_factory.mktemp("stated") / "bss"
    dataset.publish(directory, STATED)
    return directory


@pytest.fixture(scope="module")
def unstated(tmp_path_factory, dataset):
    directory = tmp_path_factory.mktemp("unstated") / "bss"
    dataset.publish(directory)
    return directory


@pytest.fixture(scope="module")
def merged(tmp_path_factory, stated):
    """Three views of two seeds, 192 rows; the one source states everything, the other one nothing."""
    folder = tmp_path_factory.mktemp("other")
    other = made_in(folder, {"attack.seed": 6, "attack.views": 1})
    other.publish(folder / "bss")
    merge_datasets([stated, folder / "bss"], folder / "merged")
    return folder / "merged"


@pytest.fixture(scope="module")
def sampled(tmp_path_factory, merged):
    """70 rows in three shards."""
    directory = tmp_path_factory.mktemp("sampled") / "bss"
    sample_rows(merged, 70, 0, directory)
    return directory


@pytest.fixture
def copy(tmp_path, stated):
    return shutil.copytree(stated, tmp_path / "bss")


def readme(directory):
    return (directory / README).read_text()


def croissant(directory):
    return json.loads((directory / CROISSANT).read_text())


def front_matter(text):
    opening, yaml, body = text.split("---\n", 2)
    assert opening == ""
    return YAML(typ="safe").load(io.StringIO(yaml)), body


def table_rows(text, section):
    """The cells of all table rows below a heading, by the first cell."""
    body = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    rows = [line[2:-2].split(" | ") for line in body.splitlines() if line.startswith("| ")]
    return {first: rest for first, *rest in rows}


def items(text, section):
    return dict(re.findall(r"^- (.*?): (.*)$", text.split(f"\n## {section}\n")[1].split("\n## ")[0], re.MULTILINE))


def example(text, marker):
    return next(code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if marker in code)


def columns_of_all_shards(directory, *names):
    values = {name: [] for name in names}
    for path in sorted(directory.glob("*.h5")):
        with h5py.File(path) as file:
            for name in names:
                values[name].append(file[name][:].ravel())
    return [np.concatenate(values[name]) for name in names]


def test_a_card_is_the_same_whoever_writes_it(stated, copy):
    (copy / README).unlink()
    (copy / CROISSANT).unlink()
    write_card(copy, read_manifest(copy), STATED)
    for name in (README, CROISSANT):
        assert (copy / name).read_bytes() == (stated / name).read_bytes()


def test_the_card_changes_no_other_file(stated, unstated):
    names = {path.name for path in stated.iterdir()}
    assert names == {path.name for path in unstated.iterdir()}
    assert {README, CROISSANT, "manifest.json"} < names
    for name in names:
        same = (stated / name).read_bytes() == (unstated / name).read_bytes()
        assert same == (name not in (README, CROISSANT)), name


@pytest.mark.parametrize("directory", ["stated", "merged", "sampled"])
def test_a_published_dataset_with_its_card_is_whole(request, directory):
    result = run_stage("shards", "verify", request.getfixturevalue(directory))
    assert result.exit_code == 0, result.stderr


def quantile(values, fraction):
    """By its definition: linear between the two values around the place."""
    values = sorted(values)
    place = fraction * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


def test_quantiles_are_those_of_the_converged_samples(stated):
    status, margin, distance = columns_of_all_shards(stated, "status", "margin", "distance")
    converged = status == Status.CONVERGED
    assert 0 < converged.sum() < len(status)
    # The difference of the two classes' probabilities, as the logistic function gives them.
    first = 1 / (1 + np.exp(-np.abs(margin[converged].astype(float))))
    expected = {"probability margin": first - (1 - first), "distance": distance[converged].astype(float)}
    rows = table_rows(readme(stated), "Converged samples")
    assert rows.pop("") == ["5%", "25%", "50%", "75%", "95%"]
    rows.pop("---", None)
    assert len(rows) == len(expected)
    for (name, cells), (start, values) in zip(rows.items(), expected.items(), strict=True):
        assert name.startswith(start)
        wanted = [quantile(values.tolist(), fraction) for fraction in (0.05, 0.25, 0.5, 0.75, 0.95)]
        np.testing.assert_allclose([float(cell) for cell in cells], wanted, rtol=0.006)  # three digits


def test_counts_are_those_of_the_shards(stated):
    (status,) = columns_of_all_shards(stated, "status")
    rows = table_rows(readme(stated), "Counts")
    files = list(stated.glob("*.h5"))
    expected = {
        "training images": 64,
        "classes": 4,
        "views of each image": 2,
        "rows: views of all images": 128,
        "target classes of each view": 2,
        "samples": 256,
        "shards": 6,
        "bytes of all shards": sum(path.stat().st_size for path in files),
    }
    assert {name: int(rows[name][0].replace(",", "")) for name in expected} == expected
    for each in Status:
        count, share = rows[f"`{each.name.lower()}`"]
        assert int(count) == (status == each).sum()
        assert share == f"{100 * int(count) / 256:.2f}%"


def test_columns_are_those_of_a_shard(stated):
    rows = table_rows(readme(stated), "Columns")
    fields = {field["name"]: field for field in croissant(stated)["recordSet"][0]["field"]}
    with h5py.File(stated / shard_name(0, 0)) as file:
        assert set(rows) - {"column", "---"} == {f"`{name}`" for name in file}
        assert set(fields) == set(file)
        for name, column in file.items():
            dtype, shape, meaning = rows[f"`{name}`"]
            assert dtype == str(column.dtype)
            assert shape == (" x ".join(map(str, column.shape[1:])) or "scalar")
            assert len(meaning) > 5
            assert fields[name]["dataType"].lower() == f"cr:{column.dtype}"
            assert fields[name].get("arrayShape", "") == ",".join(map(str, column.shape[1:]))


def test_the_card_says_from_what_the_dataset_was_made(stated, dataset):
    text = readme(stated)
    assert "`python -m stages.attack`" in text
    assert json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1]) == dataset.parameters
    facts = {cells[0].strip("`") for cells in table_rows(text, "How it was made").values()}
    assert {dataset.digests.teacher, dataset.digests.train, dataset.fingerprint, "1"} <= facts


HOW_COMBINED = {
    "merged": "The views of several datasets, listed under `merged`, were then put together.",
    "sampled": "It is a preview: `sample` says how many rows of a whole dataset, and which one.",
}


@pytest.mark.parametrize(
    ("directory", "said"), [("stated", ()), ("merged", ("merged",)), ("sampled", tuple(HOW_COMBINED))]
)
def test_the_card_says_that_a_dataset_was_made_from_others(request, directory, said):
    path = request.getfixturevalue(directory)
    text = readme(path)
    assert {name for name, sentence in HOW_COMBINED.items() if sentence in text} == set(said)
    assert json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1]) == read_manifest(path).parameters


def test_the_card_of_a_merged_dataset_counts_its_views(merged):
    text = readme(merged)
    assert "For 3 augmented views of each of 64 training images: " in text
    rows = table_rows(text, "Counts")
    assert {rows[name][0] for name in ("views of each image", "shards")} == {"3", "9"}
    assert rows["rows: views of all images"] == ["192"]


def test_the_card_of_a_sample_takes_its_rows_for_no_images(sampled):
    text = readme(sampled)
    sentence = "For 70 views of training images, drawn at random from a larger dataset: "
    assert sentence in text
    assert croissant(sampled)["description"].startswith(sentence)
    rows = table_rows(text, "Counts")
    assert rows["rows: drawn views"] == ["70"]
    assert not {"training images", "views of each image", "rows: views of all images"} & rows.keys()
    assert "views" not in table_rows(text, "How it was made")
    assert "has a block of drawn rows, as HDF5 datasets" in text


@pytest.mark.parametrize("directory", ["merged", "sampled"])
def test_quantiles_of_merged_and_sampled_datasets_are_their_own(request, directory):
    path = request.getfixturevalue(directory)
    status, distance = columns_of_all_shards(path, "status", "distance")
    cells = table_rows(readme(path), "Converged samples")["distance, L2, pixels in [0, 1]"]
    expected = np.quantile(distance[status == Status.CONVERGED].astype(float), QUANTILES)
    np.testing.assert_allclose([float(cell) for cell in cells], expected, rtol=0.006)  # three digits


@pytest.mark.parametrize("directory", ["unstated", "merged", "sampled"])  # of which one source states everything
def test_what_is_not_stated_is_said_to_be_not_stated(request, directory):
    path = request.getfixturevalue(directory)
    text = readme(path)
    stated = items(text, "Licence, source and terms")
    assert list(stated.values()) == ["not stated"] * 4
    metadata, body = front_matter(text)
    assert metadata["license"] == "unknown"
    assert metadata["pretty_name"] == "Boundary-supporting samples"
    assert body.startswith("\n# Boundary-supporting samples\n")
    assert not {"license", "url"} & croissant(path).keys()


def test_what_is_stated_is_in_both_files(stated):
    text, values = readme(stated), croissant(stated)
    assert items(text, "Licence, source and terms") == {
        "Licence of the images": "CC-BY-SA-4.0",
        "Source of the images": "Birds by me, <https://example.org/~me/birds_1?a=1&b=2>.",
        "Terms of use": "For birds only",
        "Published at": "<https://example.org/tiny-birds>",
    }
    assert front_matter(text)[0]["license"] == "cc-by-sa-4.0"
    assert (values["name"], values["license"], values["url"]) == (STATED.title, STATED.licence, STATED.url)
    assert STATED.source in values["description"]
    assert STATED.terms in values["description"]
    assert "heo2019knowledge" in values["citeAs"]


def test_the_hub_can_read_the_metadata(stated):
    card = DatasetCard.load(stated / README)
    assert card.data.pretty_name == "Tiny birds"
    assert card.data.license == "cc-by-sa-4.0"
    assert card.data.task_categories == ["image-classification"]
    assert card.data.size_categories == ["n<1K"]
    assert "knowledge-distillation" in card.data.tags
    assert card.text.strip().startswith("# Tiny birds")


def test_images_that_are_inside_are_named_among_the_limits(tmp_path, stated):
    assert "The training images are inside" in readme(stated)
    made_in(tmp_path, {"attack.embed_images": False, "attack.views": 1}).publish(tmp_path / "bss")
    assert "The training images are not inside" in readme(tmp_path / "bss")


HOSTILE = (
    "CC BY 4.0: 'quoted' \"twice\" # no comment",
    "--- title: x",
    "*bold* _slanted_ `code` [link](javascript:x) | cell ~~gone~~ $x$",
    "<script>alert(1)</script> &amp; &#60; \\n",
    "{json: [1, 2]} !!python/object:os.system & *anchor %TAG @id",
    "Lizenz für Bilder, 図, 🐦",
    "null",
    "1.0",
    "https://example.org/a|b`c<d>e*f*",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_any_text_is_shown_as_it_is_and_is_no_markup(stated, text):
    card = Card(title=text, licence=text, source=text, terms=text, url=None)
    manifest = read_manifest(stated)
    markdown = readme_text(manifest, card, None)
    metadata, body = front_matter(markdown)
    assert (metadata["pretty_name"], metadata["license"], metadata["license_name"]) == (text, "other", text)
    assert DatasetCard(markdown).data.to_dict()["license_name"] == text
    shown = items(body, "Licence, source and terms")["Licence of the images"]
    assert body.startswith(f"\n# {shown}\n")
    links = re.findall(r"(?<!\\)<(.*?)(?<!\\)>", shown)
    assert all(re.fullmatch(r"https?://[^\s<>|`]+", link) for link in links)
    for link in links:
        shown = shown.replace(f"<{link}>", re.sub(r"\W", r"\\\g<0>", link))
    assert re.sub(r"\\(.)", r"\1", shown) == text
    assert not re.search(r"(?<!\\)([*`<>\[\]|$~#]|\b_\B|\B_\b)", shown)
    assert not re.search(r"(?<!\\)&#?\w+;", shown)
    values = json.loads(croissant_card(manifest, card))
    assert values["name"] == values["license"] == text


NO_LINES = ["MIT\nmore", "MIT\r", "\x00", "a\u2028b", "\x1b[31m", "", "  ", "\ufeffMIT"]


@pytest.mark.parametrize("key", ["title", "licence", "source", "terms", "url"])
@pytest.mark.parametrize("text", NO_LINES)
def test_what_is_not_one_line_of_text_is_refused(key, text):
    with pytest.raises(ParameterError, match=rf"card\.{key}: expected one line of printable text") as caught:
        check_params(tiny_values({f"card.{key}": text}), "tiny")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("url", ["example.org", "ftp://example.org", "https://", "https://a b", "javascript:x"])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(ParameterError, match=r"card\.url: .*pattern"):
        check_params(tiny_values({"card.url": url}), "tiny")


@pytest.mark.parametrize("directory", ["stated", "unstated", "merged", "sampled"])
def test_croissant_is_valid(request, directory):
    path = request.getfixturevalue(directory)
    dataset = mlcroissant.Dataset(jsonld=str(path / CROISSANT))
    issues = dataset.metadata.ctx.issues
    assert not issues.errors
    missing = ("datePublished",) if directory == "stated" else ("datePublished", "license")  # no clock, no inventions
    assert len(issues.warnings) == len(missing)
    assert all(any(f"/{name}" in warning for name in missing) for warning in issues.warnings)
    files = {file.id: file for file in dataset.metadata.distribution if file.id != "shards"}
    assert set(files) == {file.name for file in path.iterdir()} - {README, CROISSANT}
    for name, file in files.items():
        assert file.sha256 == file_digest(path / name)
        assert file.content_size == f"{(path / name).stat().st_size} B"
        assert file.content_url == name
    assert [field.name for field in dataset.metadata.record_sets[0].fields] == [
        name.strip("`") for name in table_rows(readme(path), "Columns") if name.startswith("`")
    ]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(1, 0), (999, 0), (1000, 1), (9999, 1), (10_000, 2), (800_000, 3), (10**9, 7), (10**13, 7)],
)
def test_the_size_is_a_category_of_the_hub(stated, rows, expected):
    manifest = read_manifest(stated)
    larger = manifest.model_copy(update={"totals": manifest.totals.model_copy(update={"rows": rows})})
    assert front_matter(readme_text(larger, EMPTY_CARD, None))[0]["size_categories"] == [SIZES[expected]]


def test_the_example_with_plain_h5py_gives_samples_on_the_boundary(stated, monkeypatch):
    code = example(readme(stated), "h5py")
    assert len([line for line in code.splitlines() if line]) <= LONGEST_EXAMPLE + 1
    monkeypatch.chdir(stated)
    values = {}
    exec(code, values)
    shards = BoundaryShards(stated)
    rows = [row for row in (shards[number] for number in range(24)) if row["status"][0] == 0]
    assert len(rows) == len(values["sample"]) > 0
    for number, row in enumerate(rows):
        np.testing.assert_allclose(values["sample"][number], row["samples"][0], atol=1e-6)
        assert probability_margin(row["margin"][0]) <= 0.02
    np.testing.assert_array_equal(values["base"], [row["label"] for row in rows])
    np.testing.assert_array_equal(values["target"], [row["target"][0] for row in rows])
    np.testing.assert_array_equal(values["teacher_logits"], [row["boundary_logits"][0] for row in rows])


def test_the_example_with_the_projects_code_runs(stated, monkeypatch):
    code = example(readme(stated), "BoundaryShards")
    assert len(code.splitlines()) == 3
    monkeypatch.chdir(stated)
    values = {}
    exec(code, values)
    assert values["row"]["samples"].shape == (2, 1, 8, 8)


def test_the_examples_run_without_images(tmp_path, monkeypatch):
    made_in(tmp_path, {"attack.embed_images": False, "attack.views": 1}).publish(tmp_path / "bss")
    monkeypatch.chdir(tmp_path / "bss")
    for marker in ("h5py", "BoundaryShards"):
        values = {}
        exec(example(readme(tmp_path / "bss"), marker), values)
        assert "sample" not in values
    assert not mlcroissant.Dataset(jsonld=CROISSANT).metadata.ctx.issues.errors


def test_a_dataset_in_which_nothing_converged_says_so(tmp_path):
    split = tiny_splits()["train"]
    dataset = sample_dataset(tmp_path, split, {"views.padding": 0, "views.flip": False, "attack.views": 1})
    make_missing(dataset, tmp_path)
    predicted = np.concatenate(
        [
            h5py.File(dataset.store.path(dataset.stored_name(block)))["teacher_logits"][:].argmax(1)
            for block in dataset.blocks
        ]
    )
    wrong = sample_dataset(
        tmp_path,
        relabelled(split, (predicted + 1) % 4),
        {"views.padding": 0, "views.flip": False, "attack.views": 1},
    )
    make_missing(wrong, tmp_path)
    manifest = wrong.publish(tmp_path / "bss")
    assert quantiles_of(tmp_path / "bss", manifest, QUANTILES) is None
    assert "No sample converged." in readme(tmp_path / "bss")
    assert "100.00%" in table_rows(readme(tmp_path / "bss"), "Counts")["`base_misclassified`"]


def test_the_card_of_other_shards_is_refused(copy):
    manifest = read_manifest(copy)
    shutil.copy(copy / shard_name(1, 0), copy / shard_name(0, 0))
    with pytest.raises(ShardError, match=shard_name(0, 0)):
        write_card(copy, manifest)
    (copy / shard_name(0, 0)).unlink()
    with pytest.raises(ShardError, match=shard_name(0, 0)):
        write_card(copy, manifest)


def test_a_meaning_in_a_strangers_manifest_is_not_taken_over(copy):
    change_manifest(copy, lambda values: values["columns"]["label"].__setitem__(2, "x | y\n\n<b>z</b>"))
    manifest = read_manifest(copy)
    assert "| `label` | int64 | scalar | base class |" in readme_text(manifest, EMPTY_CARD, None)
    assert '"base class"' in croissant_card(manifest, EMPTY_CARD)


def test_parameters_in_a_strangers_manifest_stay_in_their_block(copy):
    text = "```\n# Free money\n```json"
    change_manifest(copy, lambda values: values["parameters"].update({text: text}))
    markdown = readme_text(read_manifest(copy), EMPTY_CARD, None)
    assert json.loads(re.search(r"^```json\n(.*?)^```", markdown, re.DOTALL | re.MULTILINE)[1])[text] == text
    assert "\n# Free money" not in markdown


def test_the_attack_stage_states_what_the_parameters_say(tmp_path, monkeypatch):
    make_project(tmp_path, {"card.licence": "Ask me", "attack.views": 1})
    monkeypatch.chdir(tmp_path)
    assert run_stage("attack").exit_code == 0
    card = items(readme(tmp_path / "data/bss"), "Licence, source and terms")
    assert card["Licence of the images"] == "Ask me"
    assert card["Source of the images"].startswith("UCI Optical Recognition of Handwritten Digits")
    make_project(tmp_path, {"card.source": None, "attack.views": 1})
    result = run_stage("attack")
    assert "0 computed, 3 reused" in result.stdout
    card = items(readme(tmp_path / "data/bss"), "Licence, source and terms")
    assert list(card.values()) == ["not stated"] * 4


@pytest.mark.parametrize(
    "name", ["digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "svhn", "imagefolder", "spirals"]
)
def test_presets_of_datasets_leave_no_statement_on_another_dataset(name):
    card = YAML(typ="safe").load(ROOT / f"presets/{name}.yaml")["card"]
    assert card.keys() == Card.model_fields.keys()
    assert card | {"source": None} == EMPTY_CARD.model_dump()
    assert (card["source"] is None) == (name == "imagefolder")
