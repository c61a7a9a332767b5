"""Boundary searches by the names that they have in the parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from pipeline.core.parameters import Search
from pipeline.networks.classifier import Classifier
from pipeline.search.boundary import BoundarySearch
from pipeline.search.deepfool import DeepFoolSearch
from pipeline.search.heo2019 import Heo2019Search
from pipeline.search.mixed import MixedSamples
from pipeline.search.newton import NewtonSearch
from pipeline.search.one_step import OneStepSearch
from pipeline.search.teacher_search import TeacherSearch

SEARCHES: dict[str, Callable[[Search, Classifier], BoundarySearch]] = {
    "newton": NewtonSearch.of,
    "heo2019": Heo2019Search.on_logits,
    "heo2019_probabilities": Heo2019Search.on_probabilities,
    "deepfool": DeepFoolSearch.of,
    "fgsm": OneStepSearch.fgsm,
    "random": OneStepSearch.random,
    "view": MixedSamples.view,
    "mixup": MixedSamples.mixup,
    "cutmix": MixedSamples.cutmix,
}


def module_of(search: str) -> str:
    """Return the module of a search, for digests of code."""
    return SEARCHES[search].__module__


def search_of(teacher: Classifier, given: Search, batch_size: int, device: torch.device) -> TeacherSearch:
    """Prepare the search that the parameters ask for.

    Args:
        teacher: whose boundary is sought; a copy of it is used.
        given: parameters.
        batch_size: samples per pass.
        device: where to search.
    """
    make = partial(SEARCHES[given.name], given)
    return TeacherSearch.of(teacher, make, given.tolerance, given.levels, batch_size, device)
