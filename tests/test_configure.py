"""Presets and single values over params.yaml."""

import itertools
import re

import pytest
from ruamel.yaml import YAML

from pipeline.configure import configure
from pipeline.core.errors import ParameterError
from pipeline.core.parameters import load_params
from tests.support.files import ROOT, run_stage, write_params

DATASETS = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "svhn", "imagefolder", "spirals")
RECIPES = ("quick", "paper", "photographs", "gpu", "finetune", "imagenet", "benchmark", "benchmark_light")


@pytest.fixture
def params(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text())
    return path


def preset(name):
    return str(ROOT / f"presets/{name}.yaml")


def comments(text):
    return re.findall(r"# .*", text)


def test_there_is_a_preset_for_every_dataset_and_recipe():
    assert {path.stem for path in (ROOT / "presets").glob("*")} == {*DATASETS, *RECIPES}


@pytest.mark.parametrize(("dataset", "recipe"), list(itertools.product(DATASETS, RECIPES)))
def test_presets_give_good_parameters_keep_comments_and_can_be_undone(params, dataset, recipe):
    before = params.read_text()
    configure(params, [preset(dataset), preset(recipe)])
    assert load_params(params).dataset.name == dataset
    assert comments(params.read_text()) == comments(before)
    assert not re.search(r"[&*]id\d", params.read_text())
    configure(params, [preset("digits")])
    assert re.sub(" +#", " #", params.read_text()) == re.sub(" +#", " #", before)  # a long list moves its comment


def test_paper_is_the_setting_of_the_paper(params):
    configure(params, [preset("cifar10"), preset("paper")])
    given = load_params(params)
    assert given.teacher.network == "resnet26"
    assert given.students == ["resnet8", "resnet14", "resnet20"]
    for training in (given.training, given.teacher.training):
        assert (training.epochs, training.batch_size) == (80, 256)
        assert (training.momentum, training.weight_decay) == (0.9, 1e-4)
        assert (training.learning_rate, training.milestones, training.divisor) == (0.1, [0.5, 0.75], 10)
    hinton, bss = (given.method["bss"].losses[name] for name in ("hinton", "bss"))
    assert given.method["hinton"].losses["hinton"] == hinton
    assert (hinton.temperature, hinton.start, hinton.end) == (3, 4, 1)
    assert (bss.temperature, bss.start, bss.zero_at) == (3, 2, 0.75)
    assert (given.views.padding, given.views.flip) == (4, True)
    assert given.dataset.validation_fraction == 0


def test_benchmark_is_the_recipe_of_the_field(params):
    configure(params, [preset("cifar100"), preset("benchmark")])
    given = load_params(params)
    assert (given.teacher.network, given.students) == ("cifar.resnet32x4", ["cifar.resnet8x4"])
    for training in (given.training, given.teacher.training):
        assert (training.epochs, training.batch_size, training.optimizer) == (240, 64, "sgd")
        assert (training.learning_rate, training.momentum, training.weight_decay) == (0.05, 0.9, 5e-4)
        falls = [milestone * training.epochs for milestone in training.milestones]
        assert (training.schedule, falls, training.divisor) == ("steps", [150, 180, 210], 10)
    assert (given.views.padding, given.views.flip, given.dataset.validation_fraction) == (4, True, 0)
    assert set(given.methods) <= set(given.method)
    weights = {name: method.losses for name, method in given.method.items()}
    assert given.method["kd"].cross_entropy == 0.1
    assert (weights["kd"]["kd"].temperature, weights["kd"]["kd"].weight) == (4, 0.9)
    assert (weights["dkd"]["dkd"].target, weights["dkd"]["dkd"].non_target) == (1, 8)
    assert weights["dkd"]["dkd"].warm_up * 240 == pytest.approx(20, abs=0.1)
    assert (weights["rkd"]["rkd"].distance, weights["rkd"]["rkd"].angle) == (25, 50)
    assert weights["at"]["at"].weight == 1000
    assert (weights["fitnet_one_stage"]["fitnet"].first_stage, weights["fitnet_one_stage"]["fitnet"].weight) == (0, 200)
    assert weights["kd_standardised"]["kd"].standardised
    assert weights["dkd_standardised"]["dkd"].standardised


def test_light_students_of_the_benchmark_learn_slower_and_otherwise_alike(params):
    configure(params, [preset("cifar100"), preset("benchmark")])
    before = load_params(params)
    configure(params, [preset("benchmark_light")])
    given = load_params(params)
    assert given.students == ["cifar.mobilenetv2", "cifar.shufflenetv1", "cifar.shufflenetv2"]
    assert given.training == before.training.model_copy(update={"learning_rate": 0.01})
    assert given.teacher == before.teacher


def test_changes_are_told_and_values_come_after_presets(params):
    assert configure(
        params, [preset("mnist"), "attack.views=16", "dataset.image_size=[32, 32]", "views.flip=true"]
    ) == [
        "dataset.name: digits -> mnist",
        "dataset.image_size: null -> [32, 32]",
        "dataset.validation_fraction: 0.25 -> 0.1",
        "views.padding: 1 -> 2",
        "views.flip: false -> true",
        "attack.views: 8 -> 16",
        "card.source: UCI Optical Recognition of Handwritten Digits, test part, from scikit-learn"
        " -> MNIST (LeCun, Cortes, Burges)",
        "students: [resnet8w2] -> [resnet8w4]",
    ]
    assert load_params(params).attack.views == 16
    assert load_params(params).dataset.image_size == (32, 32)


def test_a_new_method_is_added(params):
    assert configure(
        params,
        [
            "method.far={source: online, hinton: {temperature: 2, start: 4, end: 1}}",
            "methods=[far]",
        ],
    )
    far = load_params(params).method["far"]
    assert (far.source, far.losses["hinton"].temperature, set(far.losses)) == ("online", 2, {"hinton"})


def test_nothing_to_change_leaves_the_file_alone(params):
    stamp = params.stat().st_mtime_ns
    assert configure(params, ["attack.views=8"]) == []
    assert params.stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("overlay", "expected"),
    [
        ("attack.viewz=3", "attack.viewz: unknown parameter; known here: "),
        ("attack.views=many", "attack.views: Input should be a valid integer (got 'many')"),
        ("attack.views=0", "attack.views: Input should be greater than or equal to 1"),
        ("attack=3", "attack: is a group of parameters"),
        ("seeds.first=3", "seeds"),
        ("attack.views=[1", "attack.views=[1: not valid YAML"),
        ("presets/caltech.yaml", "presets/caltech.yaml: cannot be read"),
        ("views", "views: cannot be read"),
        ("=3", "unknown parameter"),
        ("dataset.path=2023-99-99", "not valid YAML"),
        ("seeds=!foo 3", "not valid YAML"),
        ("dataset.path=photos #1.zip", "put the value in quotes"),
    ],
)
def test_a_bad_overlay_is_refused_and_changes_nothing(params, overlay, expected):
    before = params.read_text()
    with pytest.raises(ParameterError) as caught:
        configure(params, [preset("cifar10"), overlay])
    assert expected in str(caught.value)
    assert overlay in str(caught.value)
    assert params.read_text() == before


def test_a_value_of_a_loss_is_changed(params):
    assert configure(params, ["method.dkd.dkd.temperature=2"]) == ["method.dkd.dkd.temperature: 4 -> 2"]
    assert load_params(params).method["dkd"].losses["dkd"].temperature == 2


def test_digits_brings_back_every_default_but_the_machines(params):
    changed = [
        "search.name=heo2019",
        "dataset.skip_bad=true",
        "training.precision=bf16-mixed",
        "evaluation.similarity_images=7",
        "method.dkd.dkd.temperature=2",
    ]
    before = params.read_text()
    configure(params, changed)
    configure(params, [preset("digits")])
    assert params.read_text() == before
    default = YAML(typ="safe").load(ROOT / "params.yaml")
    del default["runtime"]
    assert default == YAML(typ="safe").load(ROOT / "presets/digits.yaml")


def test_a_file_that_is_no_text_is_refused(params, tmp_path):
    (tmp_path / "photos.zip").write_bytes(bytes(range(256)))
    with pytest.raises(ParameterError, match=r"photos\.zip: not valid YAML"):
        configure(params, [str(tmp_path / "photos.zip")])


def test_a_preset_that_is_no_mapping_is_refused(params, tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ParameterError, match="expected a mapping of parameters"):
        configure(params, [str(tmp_path / "list.yaml")])


def test_the_command_prints_what_changed(params):
    result = run_stage("configure", "--params", params, "attack.views=16")
    assert result.stdout.splitlines() == ["attack.views: 8 -> 16", f"wrote {params}: 1 changed"]
    result = run_stage("configure", "--params", params, "attack.views=16")
    assert result.stdout.splitlines() == [f"{params}: nothing to change"]
    assert run_stage("configure", "--params", params, "attack.views=0").exit_code == 2
    assert YAML(typ="safe").load(params)["attack"]["views"] == 16


@pytest.mark.parametrize(
    ("overlays", "told"),
    [
        (["dataset.name=mnist"], True),
        (["dataset.name=mnist", "card.source=elsewhere"], False),
        ([str(ROOT / "presets/mnist.yaml")], False),
        (["attack.views=3"], False),
    ],
)
def test_a_card_that_describes_another_dataset_is_told(params, overlays, told):
    result = run_stage("configure", *overlays, "--params", params)
    assert result.exit_code == 0, result.stderr
    assert ("note: `card` still describes the dataset before" in result.stderr) == told


def test_a_value_of_a_loss_of_ones_own_is_set_by_its_key(tmp_path):
    code = tmp_path / "code"
    code.mkdir()
    (code / "losses.py").write_text(
        "from pipeline import Section, Term\n\n\n"
        "class Mine(Term):\n    class Parameters(Section):\n        weight: float\n"
    )
    path = tmp_path / "params.yaml"
    write_params(path, {"code": str(code), "method.mine": {"source": "shards", "own.losses.Mine": {"weight": 1.0}}})
    assert configure(path, ["method.mine.own.losses.Mine.weight=2.0"]) == [
        "method.mine.own.losses.Mine.weight: 1.0 -> 2.0"
    ]
