"""Quality class by class against NumPy and scikit-learn, and the images on which networks disagree."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, classification_report

from pipeline.core.store import Store
from pipeline.evaluate.quality import (
    MOST_SHOWN,
    Qualities,
    disagreements,
    quality,
    read_disagreements,
    write_disagreements,
)
from pipeline.networks.loading import load_with_digest
from pipeline.networks.weights import load_weights, save_weights
from tests.support.files import relabelled
from tests.support.helpers import CPU, log_softmax, random_logits, random_prepared, tiny_resnet


def one_hot(predicted, classes):
    return 4.0 * torch.eye(classes)[torch.tensor(predicted)]


def test_means_over_unequal_classes_by_hand():
    labels = np.array([0] * 8 + [1] * 2)
    logits = one_hot([0] * 7 + [1] * 2 + [0], 2)  # 7 of 8, and 1 of 2
    found = quality(logits, logits, labels)
    assert found.confusion.tolist() == [[7, 1], [1, 1]]
    assert found.balanced_accuracy == pytest.approx((7 / 8 + 1 / 2) / 2)
    assert found.macro_f1 == pytest.approx((7 / 8 + 1 / 2) / 2)  # precisions are as the recalls


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("classes", [2, 5, 100])
@pytest.mark.parametrize("seed", range(3))
def test_means_are_those_of_scikit_learn_over_the_classes_that_there_are(classes, seed):
    generator = np.random.default_rng(seed)
    labels = generator.choice(classes, 60, p=generator.dirichlet(np.full(classes, 0.5)))  # some classes are absent
    logits, teacher = (random_logits(number, 60, classes) for number in (seed, seed + 100))
    found = quality(logits, teacher, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes are predicted that are absent
        assert found.balanced_accuracy == pytest.approx(balanced_accuracy_score(labels, found.predicted))
        report = classification_report(labels, found.predicted, output_dict=True, zero_division=0)
    f1 = [report[str(number)]["f1-score"] for number in np.unique(labels)]
    assert found.macro_f1 == pytest.approx(np.mean(f1))
    expected = np.zeros((classes, classes), int)
    np.add.at(expected, (labels, logits.argmax(1).numpy()), 1)
    assert np.array_equal(found.confusion, expected)


def test_confidence_and_divergence_are_those_of_numpy():
    logits, teacher = random_logits(0, 40, 7), random_logits(1, 40, 7)
    found = quality(logits, teacher, np.zeros(40, np.int64))
    ours, teachers = (log_softmax(each.double().numpy()) for each in (logits, teacher))
    np.testing.assert_allclose(found.confidence, np.exp(ours).max(1), rtol=1e-12)
    np.testing.assert_allclose(found.divergence, (np.exp(teachers) * (teachers - ours)).sum(1), rtol=1e-9)
    assert quality(teacher, teacher, np.zeros(40, np.int64)).divergence == pytest.approx(0, abs=1e-12)


@pytest.fixture
def weights(tmp_path):
    """Files of a teacher and two students."""
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for number, path in enumerate(paths):
        save_weights(tiny_resnet(number), path)
    return paths


def qualities(weights, split, tmp_path):
    teacher = load_with_digest(weights[0], split, "teacher")
    return Qualities(teacher=teacher, test=split, device=CPU, store=Store(tmp_path / "store"))


def test_finished_qualities_are_found_again_and_another_split_or_teacher_has_others(weights, tmp_path):
    split = random_prepared(0, 30)
    first = qualities(weights, split, tmp_path).of_all(weights)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*.h5")}
    again = qualities(weights, split, tmp_path).of_all(weights)
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*.h5")}
    assert len(files) == 3
    for path in weights:
        assert all(np.array_equal(*pair) for pair in zip(first[path], again[path], strict=True))
        expected = load_weights(path).eval()(torch.from_numpy(split.images) / 255).argmax(1)
        assert np.array_equal(first[path].predicted, expected)
    other = relabelled(split, (split.labels + 1) % 4)
    assert qualities(weights, other, tmp_path).of_all(weights[:1])[weights[0]].confusion.tolist() != (
        first[weights[0]].confusion.tolist()
    )
    backwards = qualities(weights[::-1], split, tmp_path).of_all(weights)
    assert backwards[weights[2]].divergence == pytest.approx(0, abs=1e-9)
    assert backwards[weights[0]].divergence.mean() > 0.01


def test_disagreements_are_where_a_student_leaves_the_teacher_in_order_of_divergence(tmp_path):
    split = random_prepared(0, 50, shape=(3, 8, 8))
    teacher = random_logits(0, 50, 4)
    logits = [teacher + 0.8 * random_logits(number, 50, 4) for number in (1, 2, 3)]
    students = [quality(each, teacher, split.labels) for each in logits]
    found = disagreements(split, quality(teacher, teacher, split.labels), students)
    said = torch.stack(logits).argmax(2).numpy()
    mine = teacher.argmax(1).numpy()
    differing = [row for row in range(50) if (said[:, row] != mine[row]).any()]
    divergence = np.mean([each.divergence for each in students], axis=0)
    rows = sorted(differing, key=lambda row: -divergence[row])[:MOST_SHOWN]
    assert len(differing) > MOST_SHOWN
    assert np.array_equal(found.image, split.images[rows])
    assert np.array_equal(found.label, split.labels[rows])
    assert np.array_equal(found.teacher, mine[rows])
    np.testing.assert_allclose(found.confidence, np.exp(log_softmax(teacher.double().numpy())).max(1)[rows])
    np.testing.assert_allclose(found.divergence, divergence[rows])
    for place, row in enumerate(rows):
        votes = [list(said[:, row]).count(number) * (number != mine[row]) for number in range(4)]
        assert found.runs[place] == max(votes) > 0
        assert votes[found.student[place]] == max(votes)
    write_disagreements(tmp_path / "found.h5", found)
    assert all(np.array_equal(*pair) for pair in zip(found, read_disagreements(tmp_path / "found.h5"), strict=True))


def test_students_that_are_the_teacher_disagree_on_nothing(tmp_path):
    split, logits = random_prepared(0, 20), random_logits(0, 20, 4)
    same = quality(logits, logits, split.labels)
    found = disagreements(split, same, [same, same])
    assert len(found.image) == len(found.runs) == len(found.student) == 0
    write_disagreements(tmp_path / "found.h5", found)
    assert read_disagreements(tmp_path / "found.h5").image.shape == (0, 1, 8, 8)
