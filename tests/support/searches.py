"""Searches as functions of a network, images and classes, for tests."""

from pipeline.search.boundary import Problem
from pipeline.search.deepfool import DeepFoolSearch
from pipeline.search.heo2019 import Heo2019Search
from pipeline.search.newton import NewtonSearch
from pipeline.search.one_step import OneStepSearch


def solve(search, logits_of, images, base, target, *, reference=None, logits=None, **options):
    """What a search finds; `options` are fields of the problem."""
    reference = reference or logits_of
    logits = reference(images).detach() if logits is None else logits
    problem = Problem(
        images=images, base=base, target=target, logits=logits, reference=reference, fast=logits_of, **options
    )
    return search(problem)


def _split(options):
    """Options of the problem, and hyperparameters of the search."""
    names = ("tolerance", "levels", "batch_size", "reference", "logits", "draw")
    return {name: options.pop(name) for name in names if name in options}, options


def newton(logits_of, images, base, target, **options):
    problem, own = _split(options)
    return solve(NewtonSearch(**own), logits_of, images, base, target, **problem)


def heo2019(logits_of, images, base, target, **options):
    problem, own = _split(options)
    return solve(Heo2019Search(**own), logits_of, images, base, target, **problem)


def deepfool(logits_of, images, base, target, **options):
    problem, own = _split(options)
    return solve(DeepFoolSearch(**own), logits_of, images, base, target, **problem)


def one_step(logits_of, images, base, target, **options):
    problem, own = _split(options)
    return solve(OneStepSearch(**own), logits_of, images, base, target, **problem)
