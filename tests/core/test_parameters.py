"""Parameters: what is refused, and in which words."""

import json
import math
import re

import pytest
from ruamel.yaml import YAML

from pipeline.core.errors import ParameterError
from pipeline.core.extensions import find_loss, known_losses
from pipeline.core.parameters import MOVED, Section, check_params, for_workers, load_params
from pipeline.core.text import place_of
from pipeline.training.term import Term
from tests.support.files import ROOT, tiny_values, write_params


def refusal(changes):
    with pytest.raises(ParameterError) as caught:
        check_params(tiny_values(changes), "params.yaml")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_committed_parameters_are_valid():
    params = load_params(ROOT / "params.yaml")
    assert params.dataset.name == "digits"
    assert set(params.methods) <= set(params.method)


def test_parameters_cannot_be_changed_once_they_are_read():
    params = load_params(ROOT / "params.yaml")
    with pytest.raises(ValueError, match="frozen"):
        params.attack.views = 3


UNKNOWN = [
    ("viewz", "known here: attack, card, code, dataset"),
    ("attack.viewz", "views"),
    ("teacher.training.epoch", "epochs"),
    ("method.bss.bss.beta", "converged_only, fraction, moves_statistics, start, temperature, zero_at"),
    ("method.at.at.first_stage", "student_layers, teacher_layers, weight"),
]


LOSSES = "at, bss, crd, dist, dkd, fitnet, fsp, hinton, kd, rkd"


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_a_parameter_that_moved_says_where_it_is(old, new):
    assert f"{old}: is called {new} now" in refusal({old: 1})
    assert place_of(tiny_values(), new)[1] in place_of(tiny_values(), new)[0]


@pytest.mark.parametrize(("key", "known"), UNKNOWN)
def test_unknown_keys_are_named_with_those_that_are_known(key, known):
    message = refusal({key: 1})
    assert f"{key}: unknown parameter" in message
    assert known in message


@pytest.mark.parametrize("name", ["sauce", "algorithm", "table", "__init__"])
def test_unknown_losses_are_named_with_those_that_are_known(name):
    message = refusal({f"method.bss.{name}": 1})
    assert f"method.bss.{name}: unknown loss; known here: {LOSSES}, own.<module>.<class>" in message


@pytest.mark.parametrize("key", ["attack", "attack.views", "teacher.training.epochs", "method.bss.source", "seeds"])
def test_missing_keys_are_named(key):
    assert f"{key}: missing" in refusal({key: ...})


# Key, value, what the message must say beside the key and the value.
BAD = [
    ("attack.views", "8", "valid integer"),
    ("attack.views", 8.0, "valid integer"),
    ("attack.views", True, "valid integer"),
    ("attack.views", None, "valid integer"),
    ("attack.embed_images", 1, "valid boolean"),
    ("training.learning_rate", "0.1", "valid number"),
    ("training.learning_rate", True, "valid number"),
    ("teacher.weights", 3, "valid string"),
    ("teacher", 3, "valid dictionary"),
    ("students", "resnet8w2", "valid list"),
    ("method.bss", "bss", "valid dictionary"),
    ("attack.views", 0, "greater than or equal to 1"),
    ("attack.views", -1, "greater than or equal to 1"),
    ("attack.targets", -1, "greater than or equal to 0"),
    ("search.tolerance", 2, "less than or equal to 1"),
    ("search.tolerance", 0, "greater than 0"),
    ("search.max_gradients", 1001, "less than or equal to 1000"),
    ("attack.seed", -1, "greater than or equal to 0"),
    (
        "search.name",
        "pgd",
        "'newton', 'heo2019', 'heo2019_probabilities', 'deepfool', 'fgsm', 'random', 'view', 'mixup' or 'cutmix'",
    ),
    ("attack.compression", "zip", "'none' or 'gzip'"),
    ("dataset.name", "imagenet", "'imagefolder'"),
    ("dataset.test_fraction", 0, "greater than 0"),
    ("dataset.test_fraction", 1, "less than 1"),
    ("dataset.validation_fraction", -0.1, "greater than or equal to 0"),
    ("dataset.channels", 2, "1 or 3"),
    ("dataset.background", 256, "less than or equal to 255"),
    ("dataset.background", -1, "greater than or equal to 0"),
    ("dataset.background", 0.5, "valid integer"),
    ("dataset.train_images", 0, "greater than or equal to 1"),
    ("dataset.path", "", "at least 1 character"),
    ("dataset.validation_fraction", 1.0, "less than 1"),
    ("training.epochs", 0, "greater than or equal to 1"),
    ("training.learning_rate", 0, "greater than 0"),
    ("training.learning_rate", math.inf, "finite"),
    ("training.learning_rate", math.nan, "finite"),
    ("training.momentum", 1, "less than 1"),
    ("training.divisor", 0.5, "greater than or equal to 1"),
    ("training.divisor", math.inf, "finite"),
    ("training.precision", "16", "'32-true' or 'bf16-mixed'"),
    ("method.hinton.hinton.temperature", 0, "greater than 0"),
    ("method.hinton.hinton.end", -0.5, "greater than or equal to 0"),
    ("method.bss.bss.start", -1, "greater than or equal to 0"),
    ("method.bss.bss.fraction", 1.5, "less than or equal to 1"),
    ("method.bss.bss.zero_at", 0, "greater than 0"),
    ("method.bss.bss.converged_only", 1, "valid boolean"),
    ("method.fitnet.fitnet.first_stage", -0.1, "greater than or equal to 0"),
    ("method.fitnet.fitnet.first_stage", 1, "less than 1"),
    ("method.fitnet.fitnet.weight", 0, "greater than 0"),
    ("method.fsp.fsp.first_stage", 1, "less than 1"),
    ("method.fsp.fsp.weight", 0, "greater than 0"),
    ("method.at.at.weight", math.inf, "finite"),
    ("method.at.at.student_layers", "layer1", "valid list"),
    ("method.dkd.dkd.warm_up", 1.5, "less than or equal to 1"),
    ("method.dkd.dkd.non_target", -1, "greater than or equal to 0"),
    ("method.kd.kd.standardised", 1, "valid boolean"),
    ("method.dist.dist.intra", -1, "greater than or equal to 0"),
    ("method.rkd.rkd.angle", -1, "greater than or equal to 0"),
    ("method.rkd.rkd", 3, "valid dictionary"),
    ("runtime.device", "tpu", "'auto', 'cpu' or 'cuda'"),
    ("runtime.threads", 0, "greater than or equal to 1"),
    ("seeds", 0, "greater than or equal to 1"),
    ("teacher.network", "resnet9", "resnet<6n+2>"),
    ("teacher.network", "resnet8w0", "resnet<6n+2>"),
    ("method.bss.source", "disk", "'fresh', 'shards' or 'online'"),
]


@pytest.mark.parametrize(("key", "value", "expected"), BAD)
def test_a_bad_value_is_named_with_what_was_expected_and_what_came(key, value, expected):
    message = refusal({key: value})
    assert f"{key}: " in message
    assert expected in message
    assert f"(got {value!r})" in message


def test_a_bad_item_of_a_list_is_named_by_its_position():
    assert "training.milestones.1: Input should be less than 1 (got 1.5)" in refusal(
        {"training.milestones": [0.5, 1.5]}
    )
    assert "dataset.image_size.1: missing" in refusal({"dataset.image_size": [32]})
    assert "dataset.image_size.1: Input should be greater than or equal to 1" in refusal(
        {"dataset.image_size": [32, 0]}
    )
    message = refusal({"students": ["resnet8w2", "vgg"]})
    assert "students.1: " in message
    assert "(got 'vgg')" in message


@pytest.mark.parametrize("key", ["students", "methods"])
def test_empty_lists_are_refused(key):
    assert f"{key}: List should have at least 1 item" in refusal({key: []})


def test_a_method_that_does_not_exist_is_refused_with_those_that_do():
    message = refusal({"methods": ["original", "vid"]})
    assert "'methods' names 'vid'" in message
    assert (
        "original, hinton, bss, bss_alone, kd, kd_standardised, kd_bss, hinton_online, bss_online, fitnet, "
        "fitnet_one_stage, at, fsp, dkd, dkd_standardised, dist, rkd, crd, dkd_bss, rkd_bss" in message
    )


@pytest.mark.parametrize("key", ["students", "methods"])
def test_names_that_come_twice_are_refused(key):
    twice = {"students": ["resnet8w2", "resnet8w4", "resnet8w2"], "methods": ["bss", "hinton", "bss"]}[key]
    assert f"'{key}' names something twice: {', '.join(twice)}" in refusal({key: twice})


HINTON = {"temperature": 3, "start": 4, "end": 1}
HINTS = {"student_layers": ["layer2"], "teacher_layers": ["layer2"], "first_stage": 0.25}
FLOW = {
    "student_layers": ["layer1", "layer2"],
    "teacher_layers": ["layer1", "layer2"],
    "first_stage": 0.25,
    "weight": 1,
}


@pytest.mark.parametrize("losses", [{}, {"hinton": HINTON}, {"hinton": None}, {"hinton": HINTON, "fitnet": HINTS}])
@pytest.mark.parametrize("source", ["fresh", "shards", "online"])
def test_fresh_images_are_for_methods_without_losses_and_for_no_other(losses, source):
    method = {"source": source} | losses
    if (source == "fresh") == (not any(losses.values())):
        assert check_params(tiny_values({"method.mine": method}), "tiny").method["mine"].source == source
    else:
        message = refusal({"method.mine": method})
        fresh = "method.mine: source 'fresh' has no teacher: losses take 'shards' or 'online'"
        other = f"method.mine: source '{source}' needs at least one loss: {LOSSES}"
        assert (fresh if source == "fresh" else other) in message


def test_two_losses_that_want_a_first_stage_are_refused():
    message = refusal({"method.mine": {"source": "shards", "fitnet": HINTS, "fsp": FLOW}})
    assert "method.mine: 'fitnet' and 'fsp' both want a first stage of their own: take one of them" in message
    check_params(
        tiny_values({"method.mine": {"source": "shards", "fitnet": HINTS | {"first_stage": 0}, "fsp": FLOW}}), ""
    )


PAIRS = [(["layer1"], ["layer1", "layer2"]), (["layer1", "layer2"], ["layer1"])]


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
@pytest.mark.parametrize("method", ["fitnet", "at", "fsp", "rkd", "crd"])
def test_layers_are_named_pair_by_pair(method, student, teacher):
    key = f"method.{method}.{method}"
    message = refusal({f"{key}.student_layers": student, f"{key}.teacher_layers": teacher})
    assert f"{key}: 'student_layers' and 'teacher_layers' name as many layers, pair by pair" in message
    assert f"{key}.student_layers: List should have at least 1 item" in refusal(
        {f"{key}.student_layers": [], f"{key}.teacher_layers": []}
    )


def test_a_flow_has_two_layers_or_more():
    message = refusal({"method.fsp.fsp.student_layers": ["layer1"], "method.fsp.fsp.teacher_layers": ["layer1"]})
    assert "method.fsp.fsp: 'student_layers' names at least two layers: the flow is from each to the next" in message


def test_an_untargeted_search_takes_one_target():
    message = refusal({"search.name": "deepfool", "attack.targets": 2})
    assert "search.name: 'deepfool' goes to the nearest class, so it takes attack.targets 1" in message
    for search, targets in (("deepfool", 1), ("random", 2)):
        check_params(tiny_values({"search.name": search, "attack.targets": targets}), "tiny")


def test_a_method_knows_its_losses_and_whether_it_reads_features():
    methods = load_params(ROOT / "params.yaml").method
    assert {name: set(method.losses) for name, method in methods.items()} == {
        "original": set(),
        "hinton": {"hinton"},
        "bss": {"hinton", "bss"},
        "bss_alone": {"bss"},
        "kd": {"kd"},
        "kd_standardised": {"kd"},
        "kd_bss": {"kd", "bss"},
        "hinton_online": {"hinton"},
        "bss_online": {"hinton", "bss"},
        "fitnet": {"fitnet", "hinton"},
        "fitnet_one_stage": {"fitnet"},
        "at": {"at"},
        "fsp": {"fsp"},
        "dkd": {"dkd"},
        "dkd_standardised": {"dkd"},
        "dist": {"dist"},
        "rkd": {"rkd"},
        "crd": {"crd"},
        "dkd_bss": {"dkd", "bss"},
        "rkd_bss": {"rkd", "bss"},
    }
    assert {name for name, method in methods.items() if method.reads_features} == {
        "fitnet",
        "fitnet_one_stage",
        "at",
        "fsp",
        "rkd",
        "crd",
        "rkd_bss",
    }


def test_every_loss_that_parameters_know_has_a_term_with_parameters_of_its_own():
    terms = {name: find_loss(name) for name in known_losses()}
    assert set(terms) == {"at", "bss", "crd", "dist", "dkd", "fitnet", "fsp", "hinton", "kd", "rkd"}
    assert all(issubclass(term, Term) and issubclass(term.Parameters, Section) for term in terms.values())
    assert len({term.Parameters for term in terms.values()}) == len(terms)


def test_a_method_is_written_as_it_stands_in_a_file():
    given = tiny_values()["method"]
    assert {name: method.model_dump() for name, method in check_params(tiny_values(), "tiny").method.items()} == given


def test_what_a_loss_has_by_default_is_not_written():
    # So that what is finished stays valid when a loss gets another parameter.
    kd = {"temperature": 4, "weight": 0.9}
    for given, written in (
        (kd | {"standardised": False}, kd),
        (kd | {"standardised": True}, kd | {"standardised": True}),
    ):
        params = check_params(tiny_values({"method.kd": {"source": "shards", "kd": given}}), "tiny")
        for dumped in (params.method["kd"].model_dump(mode="json"), params.model_dump(mode="json")["method"]["kd"]):
            assert dumped == {"source": "shards", "kd": written}
        assert check_params(json.loads(params.model_dump_json()), "tiny").method["kd"] == params.method["kd"]


def test_several_mistakes_are_all_told_in_one_line():
    message = refusal({"attack.views": 0, "training.epochs": "many"})
    assert "attack.views: " in message
    assert "training.epochs: " in message


def load_text(tmp_path, content):
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(ParameterError) as caught:
        load_params(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


NOT_YAML = [b"a: [1", b"a: 1\na: 2\n", b"\xff\xfe\x00\x00", b"a: !!python/object:os.system x\n", b"a: 1\n---\nb: 2\n"]


@pytest.mark.parametrize(
    "content", NOT_YAML, ids=["open list", "key twice", "binary", "python object", "two documents"]
)
def test_what_is_not_one_plain_yaml_document_is_refused(tmp_path, content):
    assert "not valid YAML" in load_text(tmp_path, content)


@pytest.mark.parametrize("content", [b"", b"- attack\n- views\n", b"attack\n"], ids=["empty", "list", "text"])
def test_what_is_no_mapping_is_refused(tmp_path, content):
    assert "should be a valid dictionary" in load_text(tmp_path, content)


def test_what_came_instead_of_a_mapping_is_told(tmp_path):
    assert len({load_text(tmp_path, content) for content in (b"", b"- attack\n", b"attack\n")}) == 3


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / "none.yaml"
    with pytest.raises(ParameterError, match=f"^{path}: cannot be read: No such file or directory$"):
        load_params(path)
    with pytest.raises(ParameterError, match=f"^{tmp_path}: cannot be read: Is a directory$"):
        load_params(tmp_path)


def test_numbers_are_read_as_in_yaml_1_2(tmp_path):
    path = tmp_path / "params.yaml"
    write_params(path)
    text = path.read_text()
    assert text.count("weight_decay: 0.0001") == 2
    path.write_text(text.replace("weight_decay: 0.0001", "weight_decay: 1e-4").replace("flip: false", "flip: no"))
    with pytest.raises(ParameterError, match=r"views.flip: .*\(got 'no'\)$"):
        load_params(path)
    path.write_text(text.replace("weight_decay: 0.0001", "weight_decay: 1e-4"))
    assert load_params(path).training.weight_decay == 0.0001


@pytest.mark.parametrize(
    "rewritten",
    [lambda text: b"\xef\xbb\xbf" + text.encode(), lambda text: text.replace("\n", "\r\n").encode()],
    ids=["a byte order mark", "line ends of Windows"],
)
def test_files_are_read_as_any_editor_leaves_them(tmp_path, rewritten):
    path = tmp_path / "params.yaml"
    write_params(path)
    expected = load_params(path)
    path.write_bytes(rewritten(path.read_text()))
    assert load_params(path) == expected


def test_a_parameter_that_stands_twice_is_refused_by_name(tmp_path):
    path = tmp_path / "params.yaml"
    write_params(path)
    path.write_text(path.read_text() + "seeds: 3\n")
    with pytest.raises(ParameterError, match='found duplicate key "seeds"'):
        load_params(path)


def test_whole_numbers_are_taken_where_a_fraction_may_stand():
    params = check_params(tiny_values({"method.hinton.hinton.temperature": 2}), "tiny")
    assert params.method["hinton"].losses["hinton"].temperature == 2.0
    assert type(params.method["hinton"].losses["hinton"].temperature) is float


def test_the_methods_of_the_documentation_are_methods():
    blocks = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "docs/METHODS.md").read_text(), re.M | re.S)
    assert len(blocks) >= 2
    for block in blocks:
        for name, method in YAML(typ="safe").load(block)["method"].items():
            assert check_params(tiny_values({f"method.{name}": method}), "METHODS.md").method[name].losses


def test_a_loss_whose_name_is_no_text_is_refused():
    values = tiny_values()
    values["method"]["bss"][7] = {}
    with pytest.raises(ParameterError, match=r"method\.bss\.7: unknown loss"):
        check_params(values, "tiny")


def test_workers_find_the_users_code_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = check_params(tiny_values({"code": "mine"}), "tiny")
    sent = json.loads(for_workers(params))
    assert sent["code"] == str(tmp_path / "mine")
    assert check_params(sent, "sent").method == params.method
