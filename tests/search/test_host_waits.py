"""What a search asks of the device: the host waits for an answer once a round, however many rows and phases there are.

On a GPU, each question leaves it idle until the host has the answer and has asked for more work.
"""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from pipeline.search import geometry
from pipeline.search.boundary import Problem
from pipeline.search.geometry import project
from pipeline.search.newton import Limits, Phase, Rows, close, next_rows, sidestep, walk
from pipeline.search.table import SEARCHES
from tests.support.helpers import other_classes, random_images, search_parameters, tiny_resnet

LIMITS = Limits(aim=0.019, max_gradients=20, averaged=3, levels=127)
ITERATIVE = ["newton", "heo2019", "heo2019_probabilities", "deepfool", "fgsm", "random"]


class Waits(TorchFunctionMode):
    """Counts what makes a host wait for a GPU: values that it asks for, and results whose size follows from values."""

    ASKING = ("__bool__", "__int__", "__float__", "item", "tolist", "cpu", "numpy", "nonzero", "masked_select")

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in self.ASKING or (name in ("__getitem__", "__setitem__") and self._is_mask(args[1])):
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))

    @staticmethod
    def _is_mask(index):
        parts = index if isinstance(index, tuple) else (index,)
        return any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in parts)

    @property
    def total(self):
        return sum(self.counts.values())


class Passes:
    """A network that counts its passes."""

    def __init__(self, network):
        self.network, self.count = network, 0

    def __call__(self, images):
        self.count += 1
        return self.network(images)


def problem_of(seed, rows=40, batch_size=8):
    """Rows of a network that often has a third class on top, so that all phases are needed."""
    model = tiny_resnet(seed, classes=6)
    images = random_images(seed, rows)
    logits = model(images)
    base = logits.argmax(1)
    base[::7] = other_classes(base[::7], 6, seed)  # some that the network gets wrong
    network = Passes(model)
    return Problem(
        images=images,
        base=base,
        target=other_classes(base, 6, seed + 1),
        logits=logits,
        reference=network,
        fast=network,
        batch_size=batch_size,
        draw=(seed,),
    )


def values_of(result):
    return {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}


def without_values(tensor):
    """The same tensor on the device that knows shapes alone: what asks it for a value fails there."""
    return tensor.detach().to("meta")


@pytest.mark.parametrize("step", [walk, sidestep, close])
def test_no_phase_asks_for_a_value(step):
    problem = problem_of(0)
    with torch.no_grad():
        rows = Rows.at_start(problem)
        meta = Rows(**{name: without_values(value) for name, value in values_of(rows).items()})
        network = tiny_resnet(0, classes=6).to("meta")
        index = without_values(torch.arange(0, 40, 3))
        stepped = step(meta.take(index), network, LIMITS)
        meta.put(index, stepped)
        expected = step(rows.take(torch.arange(0, 40, 3)), problem.fast, LIMITS)
    for name, value in values_of(expected).items():
        found = getattr(stepped, name)
        assert (found.shape, found.dtype) == (value.shape, value.dtype), name


def test_a_value_that_is_asked_for_is_noticed():
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(without_values(torch.ones(3)).any())
    x = torch.arange(4.0)
    with Waits() as waits:
        bool(x.any())
        x.nonzero()
        x[x > 1] = 0
        x[torch.tensor([0]), ...]
        x[x > 1]
    assert waits.counts == {"__bool__": 1, "nonzero": 1, "__setitem__": 1, "__getitem__": 1}


@pytest.fixture
def unknown_masks(monkeypatch):
    """As on a GPU, where the host does not ask whether a mask holds anywhere."""
    monkeypatch.setattr(geometry, "may_hold", lambda mask: True)


@pytest.mark.usefixtures("unknown_masks")
@pytest.mark.parametrize("name", ITERATIVE)
def test_the_host_waits_once_a_round(name):
    problem = problem_of(0)
    search = SEARCHES[name](search_parameters(name=name), tiny_resnet(0, classes=6))
    with Waits() as waits:
        search(problem)
    # Each round is one pass; beside them, one question finds that all rows are done, and one which have no last pass.
    assert problem.fast.count > 10
    assert waits.total <= problem.fast.count + 2, waits.counts


@pytest.mark.parametrize("name", ITERATIVE)
@pytest.mark.parametrize("seed", range(4))
def test_what_is_found_does_not_depend_on_what_the_host_asks(name, seed, monkeypatch):
    search = SEARCHES[name](search_parameters(name=name), tiny_resnet(seed, classes=6))
    found = search(problem_of(seed))
    monkeypatch.setattr(geometry, "may_hold", lambda mask: True)
    for field, value in values_of(search(problem_of(seed))).items():
        assert torch.equal(value, getattr(found, field)), field


def test_a_projection_does_not_depend_on_what_the_host_asks(monkeypatch):
    """Of rows whose pixels saturate a little, a lot, all at once, or not at all."""
    generator = torch.Generator().manual_seed(0)
    origin, gradient = (torch.rand(200, 3, 4, 4, generator=generator) for _ in range(2))
    gradient = (gradient - 0.5) ** 5
    largest = (gradient.clamp(min=0) * origin - gradient.clamp(max=0) * (1 - origin)).sum((1, 2, 3))
    shares = torch.linspace(0.001, 1.1, 200)
    asked = project(origin, gradient, shares * largest)
    assert torch.equal(asked[:5], project(origin[:5], gradient[:5], shares[:5] * largest[:5]))  # these end early
    monkeypatch.setattr(geometry, "may_hold", lambda mask: True)
    assert torch.equal(asked, project(origin, gradient, shares * largest))


def chosen_by_hand(phases, batch_size):
    rows = {phase: np.flatnonzero(phases == phase) for phase in Phase}
    if len(rows[Phase.CLOSE]) >= batch_size or (len(rows[Phase.CLOSE]) and not len(rows[Phase.WALK])):
        return Phase.CLOSE, rows[Phase.CLOSE][:batch_size]
    if len(rows[Phase.WALK]):
        return Phase.WALK, rows[Phase.WALK][:batch_size]
    return (Phase.SIDESTEP, rows[Phase.SIDESTEP][:batch_size]) if len(rows[Phase.SIDESTEP]) else None


@pytest.mark.parametrize("seed", range(50))
def test_the_next_rows_are_the_first_ones_of_the_phase_whose_turn_it_is(seed):
    generator = np.random.default_rng(seed)
    some = generator.choice(list(Phase), generator.integers(1, 5), replace=False)
    phases = generator.choice(some, generator.integers(0, 30))
    for batch_size in (1, 3, 100):
        expected, found = chosen_by_hand(phases, batch_size), next_rows(torch.from_numpy(phases).long(), batch_size)
        if expected is None:
            assert found is None
        else:
            assert found[0] is expected[0]
            assert found[1].tolist() == expected[1].tolist()
