"""A network and a loss of the user's, from a folder that the parameters name, through all stages."""

import re
import shutil
import sys

import pytest
from safetensors.numpy import load_file, save_file

from pipeline.core import provenance
from pipeline.core.errors import ParameterError, WeightsError
from pipeline.core.extensions import find_loss, own_modules
from pipeline.core.parameters import check_params
from pipeline.core.provenance import code_digest
from pipeline.networks.classifier import Architecture, build
from pipeline.networks.weights import load_weights
from pipeline.training.term import statuses_of
from tests.support.files import finish, fork_stage, make_project, run_stage, tiny_values, write_params

NETS = '''
"""A wide ResNet (Zagoruyko and Komodakis, 2016), the smallest one."""

from torch import nn


class Block(nn.Module):
    def __init__(self, inside, outside):
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(inside), nn.ReLU(), nn.Conv2d(inside, outside, 3, padding=1, bias=False),
            nn.BatchNorm2d(outside), nn.ReLU(), nn.Conv2d(outside, outside, 3, padding=1, bias=False),
        )
        self.shortcut = nn.Conv2d(inside, outside, 1, bias=False)

    def forward(self, x):
        return self.body(x) + self.shortcut(x)


def wide_resnet(channels, classes, image_shape):
    width = 8
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), Block(width, 2 * width), nn.MaxPool2d(2), Block(2 * width, 2 * width),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, classes),
    )
'''
LOSSES = '''
"""The cosine distance of logits."""

from torch.nn import functional as F

from own.helpers import centred
from pipeline import Section, Term


class Cosine(Term):
    class Parameters(Section):
        weight: float

    def __init__(self, parameters, shapes):
        super().__init__(parameters, shapes)
        self.weight = parameters.weight

    def forward(self, step):
        ours, theirs = centred(step.logits), centred(step.teacher_batch.teacher_logits)
        return self.weight * (1 - F.cosine_similarity(ours, theirs)).mean()
'''
HELPERS = "def centred(logits):\n    return logits - logits.mean(1, keepdim=True)\n"
CHANGES = {
    "code": "mine",
    "dataset.path": ".",
    "teacher.network": "own.nets.wide_resnet",
    "teacher.training.epochs": 15,
    "students": ["own.nets.wide_resnet", "mlp1w16"],
    "methods": ["hinton", "mine"],
    "method.mine": {"source": "shards", "own.losses.Cosine": {"weight": 0.5}},
    "training.epochs": 3,
    "attack.rows_per_shard": 100,
}


def write_code(folder):
    folder.mkdir()
    for name, text in (("nets", NETS), ("losses", LOSSES), ("helpers", HELPERS)):
        (folder / f"{name}.py").write_text(text)


@pytest.fixture(autouse=True)
def no_package_of_another_test():
    yield
    for name in [name for name in sys.modules if name == "own" or name.startswith("own.")]:
        del sys.modules[name]


def run(directory, stage, *arguments):
    code, output, errors = finish(fork_stage(directory, stage, *arguments), timeout=200)
    assert code == 0, errors
    return output


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder in which all six stages ran, with the user's network as teacher and student, and the user's loss."""
    directory = tmp_path_factory.mktemp("own")
    write_code(directory / "mine")
    write_params(directory / "params.yaml", CHANGES)
    said = {}
    for stage, *arguments in (
        ("prepare",),
        ("teacher",),
        ("attack",),
        ("student", "--all"),
        ("evaluate",),
        ("report", "--views", "none"),
    ):
        said[stage] = run(directory, stage, *arguments)
    return directory, said


def test_all_six_stages_run(project):
    directory, said = project
    assert "own.nets.wide_resnet, trained for 15 epochs" in said["teacher"]
    assert said["student"].count("(2 trained, 0 reused)") == 4
    assert "own.nets.wide_resnet-mine" in {path.name for path in (directory / "models/students").iterdir()}
    assert re.search(r"^\| own\.nets\.wide_resnet \| mine \| 2 \|", said["report"], re.MULTILINE)
    assert (directory / "reports/report.html").stat().st_size > 100_000


def edit(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


EDITS = {
    "a comment in the loss": (("losses.py", "class Cosine", "# mine\nclass Cosine"), 0, 0, "finished before"),
    "the loss": (("losses.py", "(1 - F.cosine", "(2 - F.cosine"), 0, 4, "finished before"),
    "what the loss imports": (("helpers.py", "logits - logits", "logits + logits"), 0, 4, "finished before"),
    "the network": (("nets.py", "width = 8", "width = 4"), 4, 8, "trained for 15 epochs"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_makes_again_what_it_may_change(project, tmp_path, name):
    directory = tmp_path / "copy"
    shutil.copytree(project[0], directory)
    (file, old, new), shards, students, teacher = EDITS[name]
    edit(directory / "mine" / file, old, new)
    assert teacher in run(directory, "teacher")
    assert f"({shards} computed, {4 - shards} reused)" in run(directory, "attack")
    said = run(directory, "student", "--all")
    assert sum(map(int, re.findall(r"\((\d+) trained", said))) == students
    if students == 4:  # those of the loss, of both networks
        for line in said.splitlines():
            assert ("(2 trained" in line) == ("-mine:" in line)


WRONG = {
    "no such module": ({"teacher.network": "own.other.net"}, "no module 'other'"),
    "no such function": ({"teacher.network": "own.nets.narrow"}, "has no 'narrow'"),
    "no function": ({"teacher.network": "own.nets"}, "expected own.<module>.<name>"),
    "a module that fails": ({"students": ["own.broken.net"]}, "own.broken cannot be imported: ZeroDivisionError"),
    "a module that misses another": (
        {"students": ["own.needs.net"]},
        "own.needs cannot be imported: No module named 'no_such'",
    ),
    "no such loss": ({"method.mine": {"source": "shards", "own.losses.Sine": {}}}, "has no 'Sine'"),
    "a loss that is none": ({"method.mine": {"source": "shards", "own.nets.Block": {}}}, "is no loss"),
    "a parameter of a loss": (
        {"method.mine": {"source": "shards", "own.losses.Cosine": {"weight": "much"}}},
        "method.mine.own.losses.Cosine.weight: Input should be a valid number (got 'much')",
    ),
    "an unknown parameter of a loss": (
        {"method.mine": {"source": "shards", "own.losses.Cosine": {"weight": 1.0, "heigth": 2}}},
        "method.mine.own.losses.Cosine.heigth: unknown parameter; known here: weight",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(tmp_path, name):
    write_code(tmp_path / "mine")
    (tmp_path / "mine/broken.py").write_text("1 / 0\n")
    (tmp_path / "mine/needs.py").write_text("import no_such\n")
    changes, message = WRONG[name]
    with pytest.raises(ParameterError, match=re.escape(message)):
        check_params(tiny_values({"code": str(tmp_path / "mine")} | changes), "tiny")


NETWORKS = {
    "other arguments": ("def net(channels): ...", "TypeError: net() takes 1 positional argument"),
    "no module": ("def net(channels, classes, image_shape): return 7", "expected a torch module, got a int"),
    "a tuple": (
        "from torch import nn\n\n\nclass Two(nn.Module):\n    def forward(self, x): return x, x\n\n\n"
        "def net(channels, classes, image_shape): return Two()",
        "does not take images of 8x8",
    ),
    "another number of classes": (
        "from torch import nn\n\n\ndef net(channels, classes, image_shape):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))",
        "is no classifier: its output has shape (1, 3)",
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_that_is_none_is_refused(tmp_path, name):
    text, message = NETWORKS[name]
    (tmp_path / "broken.py").write_text(text)
    check_params(tiny_values({"code": str(tmp_path), "students": ["own.broken.net"]}), "tiny")
    with pytest.raises(WeightsError, match=re.escape(message)):
        build(Architecture("own.broken.net", 4, (1, 8, 8), (0.5,), (0.25,)))


TRAINING = {
    "teacher": ({"teacher.network": "own.odd.net"}, []),
    "student": ({"students": ["own.odd.net"]}, ["--all"]),
}
NO_LOGITS = {
    "probabilities": ("x.softmax(1)", "gives probabilities, expected logits"),
    "random logits": ("x + torch.randn_like(x)", "gives other logits each time it sees an image"),
    "two outputs in training": ("(x, x) if self.training else x", "gives tuple in training, expected logits (4, 4)"),
    "an object": ("SimpleNamespace(logits=x)", "one of your own gives one tensor (N, classes)"),
}


@pytest.mark.parametrize("stage", TRAINING)
@pytest.mark.parametrize("case", NO_LOGITS)
def test_a_network_that_gives_no_logits_is_refused_before_it_is_trained(tmp_path, monkeypatch, case, stage):
    (given, message), (parameters, arguments) = NO_LOGITS[case], TRAINING[stage]
    make_project(tmp_path, {"methods": ["original"]} | parameters)
    (tmp_path / "data/code").mkdir()
    (tmp_path / "data/code/odd.py").write_text(f"""
from types import SimpleNamespace

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 4)

    def forward(self, x):
        x = self.layer(x.flatten(1))
        return {given}


def net(channels, classes, image_shape):
    return Net()
""")
    monkeypatch.chdir(tmp_path)
    result = run_stage(stage, *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.startswith("error: network 'own.odd.net' ")
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("weights.safetensors"))


ODD_BUT_SOUND = {
    "views of maps": """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.maps, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8 * 64, 4)

    def forward(self, x):
        x = F.relu(self.maps(x))
        return self.head(x.view(x.size(0), -1))
""",
    "tied weights": """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(F.relu(self.second(F.relu(self.first(x.flatten(1))))))
""",
}


@pytest.mark.parametrize("kind", ODD_BUT_SOUND)
def test_networks_as_people_write_them_go_through_all_stages(tmp_path, monkeypatch, kind):
    changes = {"teacher.network": "own.odd.net", "students": ["own.odd.net"], "methods": ["bss"], "seeds": 1}
    make_project(tmp_path, changes | {"teacher.training.learning_rate": 0.02, "training.learning_rate": 0.02})
    (tmp_path / "data/code").mkdir()
    (tmp_path / "data/code/odd.py").write_text(
        "from torch import nn\nfrom torch.nn import functional as F\n\n"
        f"{ODD_BUT_SOUND[kind]}\n\ndef net(channels, classes, image_shape):\n    return Net()\n"
    )
    monkeypatch.chdir(tmp_path)
    for stage, *arguments in (["teacher"], ["attack"], ["student", "--all"], ["evaluate"]):
        result = run_stage(stage, *arguments)
        assert result.exit_code == 0, result.output
        assert "RuntimeError" not in result.stderr
        assert "view size" not in result.stderr
    weights = load_file(tmp_path / "models/students/own.odd.net-bss/seed-0.safetensors")
    if kind == "tied weights":
        assert (weights["first.weight"] == weights["second.weight"]).all()


def test_a_loss_without_a_section_is_refused(tmp_path):
    (tmp_path / "losses.py").write_text("class Mine:\n    Parameters = dict\n")
    method = {"source": "shards", "own.losses.Mine": {}}
    with pytest.raises(ParameterError, match=r"'own\.losses\.Mine' is no loss"):
        check_params(tiny_values({"code": str(tmp_path), "method.mine": method}), "tiny")


def test_a_users_package_counts_whole(tmp_path):
    """What its `__init__` defines, too; as it was when it was imported."""
    package = tmp_path / "nets"
    package.mkdir()
    (package / "__init__.py").write_text("from own.nets.body import make\n\nWIDTH = 8\n")
    (package / "body.py").write_text("def make(channels, classes, image_shape): ...\n")

    def digest():
        for name in [name for name in sys.modules if name.startswith("own")]:
            del sys.modules[name]
        provenance._content_of.cache_clear()
        check_params(tiny_values({"code": str(tmp_path), "students": ["own.nets.make"]}), "tiny")
        return code_digest(*own_modules("own.nets.make"))

    before = digest()
    edit(package / "__init__.py", "WIDTH = 8", "WIDTH = 4")
    assert code_digest("own.nets") == before  # this process runs what it imported
    other = digest()
    assert other != before
    edit(package / "body.py", "...", "pass")
    assert digest() != other


def test_losses_that_want_samples_of_different_kinds_are_refused(tmp_path):
    (tmp_path / "losses.py").write_text(
        "from pipeline import Section, Status, Term\n\n\nclass Mine(Term):\n    class Parameters(Section): ...\n\n"
        "    @classmethod\n    def statuses(cls, parameters): return (Status.NOT_CONVERGED,)\n"
    )
    both = {**tiny_values()["method"]["bss"], "own.losses.Mine": {}}
    params = check_params(tiny_values({"code": str(tmp_path), "method.mine": both}), "tiny")
    with pytest.raises(ParameterError, match=r"bss, own\.losses\.Mine: use samples of different statuses"):
        statuses_of(params.method["mine"].losses)


def test_a_strangers_file_may_not_name_the_users_code(tmp_path, project):
    """Unless the parameters name the same network."""
    weights = project[0] / "models/teacher.safetensors"
    state = load_file(weights)
    write_code(tmp_path / "mine")
    (tmp_path / "mine/trap.py").write_text("raise SystemExit('the trap was sprung')\n")
    check_params(tiny_values({"code": str(tmp_path / "mine"), "students": ["own.nets.wide_resnet"]}), "tiny")
    assert load_weights(weights).architecture.network == "own.nets.wide_resnet"
    description = '{"network": "own.trap.net", "classes": 10, "image_shape": [1, 8, 8], "mean": [0.5], "std": [0.2]}'
    save_file(state, tmp_path / "theirs.safetensors", {"architecture": description})
    with pytest.raises(WeightsError, match=r"'own\.trap\.net' runs code of yours"):
        load_weights(tmp_path / "theirs.safetensors")


def test_a_users_loss_is_found_by_its_name(tmp_path):
    write_code(tmp_path / "mine")
    check_params(tiny_values({"code": str(tmp_path / "mine")}), "tiny")
    assert find_loss("own.losses.Cosine").Parameters.model_validate({"weight": 0.5}).weight == 0.5
    assert own_modules("own.losses.Cosine", "hinton") == ["own.losses"]
