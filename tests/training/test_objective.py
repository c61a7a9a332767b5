"""What is minimised, and when: features of layers, stages, and weights that are trained along."""

import copy
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pipeline.core.errors import ParameterError
from pipeline.losses.at import AtTerm
from pipeline.losses.fitnet import FitNetTerm
from pipeline.losses.fsp import FspTerm
from pipeline.losses.rkd import RkdTerm
from pipeline.networks.classifier import Architecture, Classifier
from pipeline.training import fit as training
from pipeline.training.batches import Batch, TeacherBatch
from pipeline.training.fit import learning_rate
from pipeline.training.objective import Moment, Objective
from pipeline.training.term import feature_layers, feature_shapes, recorded
from tests.support.files import tiny_params, tiny_splits, tiny_teacher
from tests.support.fits import Recorded, StoppedError, fit_tiny, same_state, state_in, stop_at
from tests.support.helpers import (
    features_of,
    hinton_parameters,
    loss_of,
    random_images,
    random_normal,
    tiny_resnet,
    training_student,
    untrained,
    wide_teacher,
)


def hooks_of(classifier):
    return sum(len(module._forward_hooks) for module in classifier.modules())


# Features


def test_recorded_gives_the_outputs_of_the_last_pass():
    model = wide_teacher()
    first, second = random_images(0, 3), random_images(1, 5)
    with recorded(model, ["layer3", "conv1", "linear"]) as outputs:
        assert outputs == {}
        model(first)
        model(second)
    expected = features_of(model, second)
    assert outputs.keys() == {"layer3", "conv1", "linear"}
    for name, output in outputs.items():
        torch.testing.assert_close(output.double(), torch.from_numpy(expected[name]), rtol=1e-5, atol=1e-6)


def test_recorded_gives_what_a_layer_gave_also_where_the_next_one_works_in_place():
    model, images = wide_teacher(), random_images(0, 3)
    with recorded(model, ["bn1"]) as outputs:
        model(images)
    expected = model.network.bn1(model.network.conv1((images - model.mean) / model.std))
    torch.testing.assert_close(outputs["bn1"], expected)


def test_recorded_removes_its_hooks_and_hears_nothing_afterwards():
    model = tiny_resnet(0)
    with recorded(model, ["layer1"]) as outputs:
        assert hooks_of(model) == 1
        model(random_images(0, 3))
    assert hooks_of(model) == 0
    before = outputs["layer1"]
    model(random_images(1, 3))
    assert outputs["layer1"] is before


def test_recorded_removes_its_hooks_after_an_error():
    model = tiny_resnet(0)

    def failing_pass():
        with recorded(model, ["layer1", "layer2"]):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        failing_pass()
    assert hooks_of(model) == 0
    with pytest.raises(ParameterError), recorded(model, ["layer1", "layer9"]):
        pass
    assert hooks_of(model) == 0


def test_features_of_lower_precision_are_given_as_float32():
    model = tiny_resnet(0).bfloat16()
    with recorded(model, ["layer1"]) as outputs:
        model(random_images(0, 3).bfloat16())
    assert outputs["layer1"].dtype == torch.float32


def test_shapes_are_those_for_one_image_and_nothing_is_changed():
    model = training_student()
    before = copy.deepcopy(model.state_dict())
    shapes = feature_shapes(model, ["layer3", "layer1", "linear"])
    assert {name: tuple(shape) for name, shape in shapes.items()} == {
        "layer1": (2, 8, 8),
        "layer3": (8, 2, 2),
        "linear": (4,),
    }
    assert model.training
    assert hooks_of(model) == 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    evaluated = tiny_resnet(0)
    feature_shapes(evaluated, ["layer1"])
    assert not evaluated.training
    assert feature_shapes(model, []) == {}


def test_layers_that_several_losses_look_at_are_recorded_once():
    at = AtTerm.Parameters(student_layers=["layer1", "layer2"], teacher_layers=["conv1", "layer2"], weight=1.0)
    rkd = RkdTerm.Parameters(student_layers=["layer2"], teacher_layers=["layer3"], distance=1.0, angle=1.0)
    expected = ["layer1", "layer2"], ["conv1", "layer2", "layer3"]
    assert feature_layers([at, hinton_parameters(), rkd]) == expected


class Parts(nn.Module):
    """A network of which one layer gives two tensors, and another one takes no part."""

    def __init__(self):
        super().__init__()
        self.pair, self.idle, self.last = Pair(), nn.Conv2d(1, 2, 1), nn.Linear(64, 4)

    def forward(self, x):
        return self.last(self.pair(x)[0].flatten(1))


class Pair(nn.Module):
    def forward(self, x):
        return x, x


def classifier_of_parts():
    return Classifier(Parts(), Architecture("parts", 4, (1, 8, 8), (0.5,), (0.25,)))


def at(student, teacher):
    return {"at": AtTerm.Parameters(student_layers=[student], teacher_layers=[teacher], weight=1.0)}


def fitnet(student, teacher, first_stage=0.25):
    given = FitNetTerm.Parameters(student_layers=[student], teacher_layers=[teacher], first_stage=first_stage)
    return {"fitnet": given}


def fsp(*layers):
    return {"fsp": FspTerm.Parameters(student_layers=layers[0], teacher_layers=layers[1], first_stage=0.25, weight=1.0)}


def refusal(losses, student=None, teacher=None):
    with pytest.raises(ParameterError) as caught:
        Objective(student or training_student(), losses, teacher or wide_teacher())
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_layer_that_does_not_exist_is_refused_with_those_that_do():
    message = refusal(at("layer9", "layer1"))
    assert message.startswith(
        "network 'resnet8w2' has no layer 'layer9', expected one of: conv1, bn1, layer1, layer1.0"
    )
    assert "resnet8w4' has no layer 'stem', expected one of: " in refusal(at("layer1", "stem"))
    assert "has no layer ''" in refusal(at("", "layer1"))  # the network itself


def test_a_layer_that_gives_no_tensor_is_refused():
    message = refusal(at("pair", "layer1"), classifier_of_parts())
    assert message == "layer 'pair' of 'parts' gives no tensor: name another one"


def test_a_layer_that_takes_no_part_is_refused():
    student = classifier_of_parts()
    assert refusal(at("idle", "layer1"), student) == "layer 'idle' of 'parts' takes no part: name another"
    assert hooks_of(student) == 0


@pytest.mark.parametrize(("name", "losses"), [("at", at("layer1", "layer2")), ("fitnet", fitnet("layer1", "layer2"))])
def test_maps_of_different_size_are_refused(name, losses):
    assert refusal(losses) == (
        f"layers of '{name}', 'layer1' to 'layer2': the shapes (2, 8, 8) and (8, 4, 4) cannot be matched; "
        "name layers whose maps have the same height and width"
    )


NO_MAPS = {
    "at": at("layer3", "linear"),
    "fitnet": fitnet("layer3", "linear"),
    "fsp": fsp(["layer1", "layer3"], ["layer1", "linear"]),
}


@pytest.mark.parametrize("name", NO_MAPS)
def test_layers_that_give_no_maps_are_refused(name):
    assert refusal(NO_MAPS[name]) == (
        f"layers of '{name}', 'layer3' to 'linear': the shapes (8, 2, 2) and (4,) cannot be matched; "
        "name layers whose outputs are maps (channels, height, width)"
    )


def test_what_can_be_matched_is_not_refused():
    student, teacher = training_student(), wide_teacher()
    Objective(student, fsp(["layer1", "layer2"], ["layer2", "layer3"]), teacher)  # of any size
    rkd = RkdTerm.Parameters(student_layers=["layer3"], teacher_layers=["linear"], distance=1.0, angle=1.0)
    batch = Batch(images=random_images(0, 6), labels=torch.arange(6) % 4)
    assert torch.isfinite(loss_of(student, {"rkd": rkd}, batch, teacher=teacher))


# Stages


def moments(objective, epochs):
    return [tuple(objective.moment(epoch, epochs)) for epoch in range(epochs)]


def two_stages(first_stage, student=None):
    return Objective(student or training_student(), fitnet("layer2", "layer2", first_stage), wide_teacher())


def test_a_method_of_one_stage_spends_all_epochs_in_it():
    objective = Objective(training_student(), {"hinton": hinton_parameters()})
    assert moments(objective, 3) == [(False, 0, 3), (False, 1, 3), (False, 2, 3)]
    assert moments(objective, 1) == [(False, 0, 1)]


def test_a_quarter_of_eight_epochs_is_two():
    assert moments(two_stages(0.25), 8) == [(True, epoch, 2) for epoch in range(2)] + [
        (False, epoch, 6) for epoch in range(6)
    ]


@pytest.mark.parametrize(("first_stage", "epochs", "first"), [(0.01, 8, 1), (0.99, 8, 7), (0.25, 2, 1), (0.9, 2, 1)])
def test_each_stage_has_at_least_one_epoch(first_stage, epochs, first):
    assert [moment[0] for moment in moments(two_stages(first_stage), epochs)] == [True] * first + [False] * (
        epochs - first
    )


def test_two_stages_in_one_epoch_are_refused():
    with pytest.raises(
        ParameterError, match=r"training\.epochs: a method with a first stage of its own needs at least"
    ):
        two_stages(0.25).moment(0, 1)


def test_rates_start_again_in_the_second_stage():
    changes = {"epochs": 12, "milestones": [0.5], "divisor": 10, "learning_rate": 0.1}
    parameters = tiny_params().training.model_copy(update=changes)
    objective = two_stages(0.34)
    rates = [learning_rate(parameters, objective.moment(epoch, 12)) for epoch in range(12)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01] + [0.1] * 4 + [0.01] * 4)


def test_the_first_stage_moves_only_weights_up_to_the_hinted_layer_and_knows_no_labels():
    batch = Batch(images=random_images(1, 12), labels=torch.arange(12) % 4)
    losses = []
    for labels in (batch.labels, batch.labels.flip(0)):
        student = training_student()
        torch.manual_seed(3)  # of the regressor
        loss = two_stages(0.25, student).loss(student, Batch(images=batch.images, labels=labels), Moment(True, 0, 2))
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[1]
    reached = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert reached == {
        name for name, _ in student.named_parameters() if not name.startswith(("network.layer3.", "network.linear."))
    }
    assert len(reached) == 15  # of conv1 and bn1, and of the two blocks: 1 + 2 and 2 x (1 + 2 + 1 + 2)


def test_the_second_stage_reaches_all_weights_and_no_regressor():
    student = training_student()
    objective = two_stages(0.25, student)
    objective.loss(
        student, Batch(images=random_images(1, 12), labels=torch.arange(12) % 4), Moment(False, 0, 2)
    ).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in student.network.linear.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in objective.terms.parameters())


class Passes:
    """Counts the passes of a classifier."""

    def __init__(self, classifier):
        self.count = 0
        classifier.register_forward_hook(self._more)

    def _more(self, *_):
        self.count += 1


def test_the_teacher_passes_only_in_the_stage_that_looks_at_it():
    student, teacher = training_student(), wide_teacher()
    objective = Objective(student, fitnet("layer2", "layer2"), teacher)
    passes = Passes(teacher)
    batch = Batch(images=random_images(1, 12), labels=torch.arange(12) % 4)
    objective.loss(student, batch, Moment(False, 0, 2))
    assert passes.count == 0
    objective.loss(student, batch, Moment(True, 0, 2))
    assert passes.count == 1
    assert hooks_of(student) == 0


def test_losses_add_up():
    student, teacher = training_student(), wide_teacher()
    batch = TeacherBatch(
        images=random_images(1, 12), labels=torch.arange(12) % 4, teacher_logits=random_normal(2, 12, 4)
    )
    rkd = {"rkd": RkdTerm.Parameters(student_layers=["layer3"], teacher_layers=["layer3"], distance=2.0, angle=3.0)}
    singles = [{"hinton": hinton_parameters()}, at("layer2", "layer2"), rkd]
    plain = loss_of(student, {}, batch).item()
    together = loss_of(student, singles[0] | singles[1] | singles[2], batch, teacher=teacher).item()
    parts = [loss_of(student, each, batch, teacher=teacher).item() - plain for each in singles]
    assert all(part > 1e-3 for part in parts)
    assert together == pytest.approx(plain + sum(parts), rel=1e-5)


# Fits


def teacher_of_tiny_images():
    """A resnet8w4 for the tiny images; untrained, which is teacher enough for a regression."""
    train = tiny_splits()["train"]
    architecture = tiny_teacher().architecture._replace(network="resnet8w4")
    return untrained(architecture, torch.from_numpy(train.images).float() / 255)


class Made:
    """Makes objectives, and keeps them."""

    def __init__(self, **losses):
        self.losses, self.objectives, self.first_weights = losses, [], []

    def __call__(self, classifier):
        objective = Objective(classifier, self.losses, teacher_of_tiny_images())
        self.objectives.append(objective)
        self.first_weights.append(copy.deepcopy(objective.terms.state_dict()))
        return objective


LAYERS = ["layer1", "layer2"]
HINTS = {"fitnet": FitNetTerm.Parameters(student_layers=LAYERS, teacher_layers=LAYERS, first_stage=0.5)}
FLOW = {"fsp": FspTerm.Parameters(student_layers=LAYERS, teacher_layers=LAYERS, first_stage=0.5, weight=1.0)}


@pytest.fixture
def every_epoch(monkeypatch):
    """A checkpoint after every epoch."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1)


@pytest.mark.parametrize("losses", [HINTS, FLOW], ids=["fitnet", "fsp"])
def test_weights_that_are_trained_along_move_in_the_first_stage_and_are_not_saved(tmp_path, losses, every_epoch):
    made, seen = Made(**losses), []

    def before(epoch):
        seen.append(copy.deepcopy(made.objectives[0].terms.state_dict()))

    result = fit_tiny(tmp_path, Recorded(before), objective=made, learning_rate=0.02)
    (first,) = made.first_weights
    assert len(first) == 4  # two convolutions with bias
    for name, value in first.items():
        assert torch.equal(seen[0][name], value), name
        assert not torch.equal(seen[1][name], value), name
        assert not torch.equal(seen[3][name], seen[2][name]), name
        # The second stage leaves them alone.
        assert torch.equal(seen[5][name], seen[3][name]), name
    plain = fit_tiny(tmp_path, key="plain", epochs=1)
    assert load_file(result.weights).keys() == load_file(plain.weights).keys()


def test_weights_that_are_trained_along_are_in_the_checkpoint(tmp_path, every_epoch):
    made = Made(**HINTS)
    with pytest.raises(StoppedError):
        fit_tiny(tmp_path, Recorded(stop_at(2)), objective=made)
    state = state_in(tmp_path / "key/checkpoint.pt")
    terms = made.objectives[0].terms.state_dict()
    assert state["terms"].keys() == terms.keys()
    assert len(terms) == 4
    for name, value in terms.items():
        assert torch.equal(state["terms"][name], value), name


def first_weights(store, losses, seed):
    """Of the student, before the first step."""
    made, seen = Made(**losses), []

    def before(epoch):
        seen.append(copy.deepcopy(made.objectives[0].network.state_dict()))
        raise StoppedError

    with pytest.raises(StoppedError):
        fit_tiny(store, Recorded(before), objective=made, seed=seed)
    return seen[0]


def test_a_students_first_weights_follow_from_its_seed_whatever_it_minimises(tmp_path):
    plain = first_weights(tmp_path, {}, 4)
    for losses in (HINTS, FLOW, {"hinton": hinton_parameters()}):
        other = first_weights(tmp_path, losses, 4)
        for name, value in plain.items():
            assert torch.equal(other[name], value), name
    assert not torch.equal(first_weights(tmp_path, HINTS, 5)["network.conv1.weight"], plain["network.conv1.weight"])


def test_a_first_stage_helps_itself_to_the_epochs_that_it_is_given(tmp_path):
    result = fit_tiny(tmp_path, objective=Made(**HINTS), learning_rate=0.02)
    # Three epochs each: whole rate, divided in the second half, and again.
    assert [row["learning_rate"] for row in result.curve] == pytest.approx([0.02, 0.02, 0.002] * 2)
    losses = [row["loss"] for row in result.curve]
    assert losses[2] < losses[0]
    assert losses[5] < losses[3]


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("losses", [HINTS, FLOW], ids=["fitnet", "fsp"])
def test_a_fit_of_two_stages_resumes_as_if_nothing_had_happened(tmp_path, losses, stop, every_epoch):
    undisturbed = fit_tiny(tmp_path / "undisturbed", objective=Made(**losses), validation=True)
    with pytest.raises(StoppedError):
        fit_tiny(tmp_path / "stopped", Recorded(stop_at(stop)), objective=Made(**losses), validation=True)
    source = Recorded()
    result = fit_tiny(tmp_path / "stopped", source, objective=Made(**losses), validation=True)
    assert source.epochs == list(range(stop, 6))
    assert same_state(result.weights.read_bytes(), undisturbed.weights.read_bytes())
    assert result.curve == undisturbed.curve


def test_the_error_of_a_fit_that_is_too_short_for_its_stages_comes_before_any_step(tmp_path):
    source = Recorded()
    message = "training.epochs: a method with a first stage of its own needs at least 2"
    with pytest.raises(ParameterError, match=re.escape(message)):
        fit_tiny(tmp_path, source, objective=Made(**HINTS), epochs=1)
    assert source.epochs == []
