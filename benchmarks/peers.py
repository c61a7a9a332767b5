"""The boundary search beside attacks that minimise the distance, and how near each comes to the nearest of them all."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.attack import TOLERANCE, Counted, foolbox_samples, ours, plain_loop, with_foolbox
from benchmarks.measuring import Searches, Spread, publish, real_searches, seconds_of, table
from pipeline.core.status import Status
from pipeline.machine.device import keep_freed_memory
from pipeline.networks.fast import folded, halved
from pipeline.search.boundary import LogitsFunction, Problem, judge
from pipeline.search.geometry import as_ray, per_row
from pipeline.search.newton import AIM, Limits, Phase, Rows, close


def with_adv_lib(fast: Counted, teacher: Counted, todo: Searches, attack: str, options: dict[str, Any]) -> Tensor:
    """Return a targeted attack of adversarial-library, by the name of its function."""
    # Its logger imports visdom, of which nothing is called here; on Python 3.11 that builds with old setuptools only.
    sys.modules.setdefault("visdom", ModuleType("visdom"))
    import adv_lib.attacks

    samples: Tensor = getattr(adv_lib.attacks, attack)(teacher, todo.images, todo.target, targeted=True, **options)
    return samples


def with_projection(fast: Counted, teacher: Counted, todo: Searches, steps: int) -> Tensor:
    """Return FMN of foolbox with the projection of Pintor et al. (2021), Algorithm 1.

    `L2FMNAttack.project` of foolbox 3.3.4 divides the norm by itself instead of the radius by the norm. So no
    perturbation gets shorter, and the best one is at the end of the first step, whose length is 1, or of a later one.
    """
    import eagerpy
    import foolbox

    class ProjectingFMN(foolbox.attacks.L2FMNAttack):  # type: ignore[misc]
        def project(self, x: Any, x0: Any, epsilon: Any) -> Any:
            norm = foolbox.devutils.flatten(x - x0).norms.l2(axis=-1)
            factor = eagerpy.minimum(1, epsilon / eagerpy.maximum(norm, 1e-12))
            return x0 + (x - x0) * foolbox.devutils.atleast_kd(factor, x.ndim)

    return foolbox_samples(ProjectingFMN(steps=steps), teacher, todo, targeted=True)


@torch.no_grad()
def on_their_rays(reference: LogitsFunction, todo: Searches, samples: Tensor) -> Tensor:
    """Return the points of the boundary (R, C, H, W) on the lines from images to samples (R, C, H, W).

    The root of the margin is found as the default search does, within the same tolerance, by forward passes. A sample
    stays where it is if no root is found, or a third class is on top there.
    """
    problem = Problem(
        images=todo.images,
        base=todo.base,
        target=todo.target,
        logits=todo.logits,
        reference=reference,
        fast=reference,
        tolerance=TOLERANCE,
    )
    delta, scale = as_ray(samples - todo.images, levels=None)
    rows = Rows.at_start(problem)
    rows = replace(
        rows,
        delta=delta,
        delta_scale=scale,
        slope=-rows.start_margin / scale,
        phase=torch.full_like(rows.phase, Phase.CLOSE),
    )
    limits = Limits(aim=AIM * TOLERANCE, max_gradients=0, averaged=1, levels=None)
    while len(index := (rows.phase == Phase.CLOSE).nonzero().squeeze(1)):
        rows.put(index, close(rows.take(index), reference, limits))
    done = rows.found & (judge(rows.boundary_logits, todo.base, todo.target, TOLERANCE) == Status.CONVERGED)
    return torch.where(per_row(done), todo.images + rows.delta * per_row(rows.delta_scale), samples)


@torch.no_grad()
def distance_of(todo: Searches, samples: Tensor) -> Tensor:
    """Return L2 distances (R,) of samples on the boundary, or with the target class on top; of others infinity.

    Args:
        todo: the searches.
        samples: (R, C, H, W).
    """
    logits = todo.teacher(samples)
    there = judge(logits, todo.base, todo.target, TOLERANCE) == Status.CONVERGED
    there |= logits.argmax(1) == todo.target
    return torch.where(there, (samples - todo.images).flatten(1).norm(dim=1), torch.inf)


def optimality(distances: Tensor, smallest: Tensor) -> float:
    """Return the local optimality of Cinà et al. (AttackBench, AAAI 2025, arXiv 2404.19460), Eq. 4 and 5, in [0, 1].

    With rho(e) the share of images that withstand perturbations up to e, and e_0 the least e at which the best attack
    leaves none: (rho(0) e_0 - area under rho from 0 to e_0) over the same of the best attack. All images are
    classified correctly here, so rho(0) is 1, and the area is the mean of min(distance, e_0).

    Args:
        distances: (R,), infinite where nothing was found.
        smallest: (R,), finite and not all the same, the smallest distance that any method found.

    Example:
        >>> optimality(torch.tensor([2.0, 3.0, torch.inf]), torch.tensor([1.0, 3.0, 5.0]))
        0.8333333134651184
    """
    end = smallest.max()
    return float((end - distances).clamp(min=0).mean() / (end - smallest).mean())


class Method(NamedTuple):
    """A way to search: from networks and searches to samples (R, C, H, W)."""

    run: Callable[[Counted, Counted, Searches], Tensor]
    once: bool = False
    """It is so slow that one run is enough."""


def adv_lib_attacks(steps: int) -> dict[str, dict[str, Any]]:
    """Return the options of attacks of adversarial-library, by their names.

    First steps and norms are those that came nearest on 24 images (12 for 1,000 steps), two of them among those of the
    comparison. Tried were the library's own, those of AttackBench, and parts of them: they suit distances of about 1,
    and here these are about 0.06.
    """
    return {
        "ddn": {"steps": steps, "init_norm": 0.1, "levels": None},  # not quantised
        "fmn": {"steps": steps, "α_init": 0.1, "norm": 2},  # noqa: RUF001
        "alma": {"num_steps": steps, "init_lr_distance": 0.1 if steps == 100 else 0.03},
        "pdgd": {"num_steps": steps, "primal_lr": 0.1 if steps == 1000 else 0.001},
    }


METHODS = {
    "newton (ours)": Method(partial(ours, gradients=3)),
    "newton, mean of 7 gradients": Method(partial(ours, gradients=7)),
    "plain loop of the paper's rule": Method(partial(plain_loop, frozen=True)),
    "foolbox DDN, 100 steps": Method(partial(with_foolbox, attack="DDNAttack", targeted=True, steps=100)),
    "foolbox FMN, 100 steps, as released": Method(
        partial(with_foolbox, attack="L2FMNAttack", targeted=True, steps=100)
    ),
    "foolbox FMN, 100 steps, projecting": Method(partial(with_projection, steps=100)),
    **{
        f"adv-lib {attack.upper()}, {steps:,} steps": Method(
            partial(with_adv_lib, attack=attack, options=options), once=steps == 1000
        )
        for steps in (20, 100, 1000)
        for attack, options in adv_lib_attacks(steps).items()
    },
}


@click.command()
@click.option("--runs", default=3, show_default=True, help="Runs of each method, in turn; of 1,000 steps one.")
@click.option("--threads", default=1, show_default=True, help="Of the CPU, in one process.")
@click.option("--device", default="cpu", show_default=True, help="Where to search.")
@click.option("--rows", default=48, show_default=True, help="Searches, the same ones for every method.")
def main(runs: int, threads: int, device: str, rows: int) -> None:
    """Search with every method, and on the rays to its samples, on the same images with the same network.

    Example: python -m benchmarks.peers
    """
    torch.set_num_threads(threads)
    keep_freed_memory()  # as all stages do; for every method here
    todo = real_searches(rows, torch.device(device))
    half = halved(folded(todo.teacher))
    samples: dict[str, dict[str, Tensor]] = {}
    rates: dict[str, list[float]] = {name: [] for name in METHODS}
    cost: dict[str, dict[str, float]] = {}
    for run in tqdm(range(runs), unit="run", disable=None):
        for name, method in METHODS.items():
            if run and method.once:
                continue
            fast, teacher, root = Counted(half), Counted(todo.teacher), Counted(todo.teacher)
            seconds, returned = seconds_of(partial(method.run, fast, teacher, todo), todo.images.device)
            samples[name] = {"returned": returned, "at_root": on_their_rays(root, todo, returned)}
            rates[name].append(rows / seconds)
            cost[name] = {
                "equivalents": (fast.equivalents + teacher.equivalents) / rows,
                "equivalents_of_root": root.equivalents / rows,
            }
    distances = {name: {way: distance_of(todo, found) for way, found in ways.items()} for name, ways in samples.items()}
    smallest = torch.stack([each for ways in distances.values() for each in ways.values()]).amin(0)
    records = [
        {
            "method": name,
            "searches": rows,
            "samples_per_second": Spread.of(rates[name])._asdict(),
            **cost[name],
            **{way: _figures(todo, found, distances[name][way], smallest) for way, found in samples[name].items()},
        }
        for name in METHODS
    ]
    publish("peers", todo.images.device, records, table([_row(record, records[0]) for record in records]))


@torch.no_grad()
def _figures(todo: Searches, samples: Tensor, distances: Tensor, smallest: Tensor) -> dict[str, float | None]:
    ratios = (distances / smallest).quantile(torch.tensor([0.5, 0.9]).to(distances), interpolation="higher").tolist()
    on_boundary = judge(todo.teacher(samples), todo.base, todo.target, TOLERANCE) == Status.CONVERGED
    median, p90 = (value if math.isfinite(value) else None for value in ratios)  # None: more than that were not found
    return {
        "found": float(distances.isfinite().float().mean()),
        "on_boundary": float(on_boundary.float().mean()),
        "optimality": optimality(distances, smallest),
        "ratio_median": median,
        "ratio_p90": p90,
    }


def _row(record: dict[str, Any], first: dict[str, Any]) -> dict[str, str]:
    rate, first_rate = (each["samples_per_second"]["median"] for each in (record, first))
    ways = record["returned"], record["at_root"]
    ratios = [[_ratio(way[name]) for name in ("ratio_median", "ratio_p90")] for way in ways]
    return {
        "search": record["method"],
        "n": str(record["searches"]),
        "samples/s": Spread(**record["samples_per_second"]).text(1),
        "ours is faster by": f"{first_rate / rate:.1f}",
        "gradient equivalents + of the root": f"{record['equivalents']:.1f} + {record['equivalents_of_root']:.1f}",
        "on the boundary; with the root": "; ".join(f"{way['on_boundary']:.0%}" for way in ways),
        "optimality; with the root": "; ".join(f"{way['optimality']:.3f}" for way in ways),
        "L2 over the smallest, median / p90": " / ".join(ratios[0]),
        "with the root": " / ".join(ratios[1]),
    }


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
