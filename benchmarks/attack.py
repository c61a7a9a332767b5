"""The boundary search beside a plain loop of the paper's rule and general attack libraries: speed, cost, closeness."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.measuring import (
    MEAN,
    STD,
    Searches,
    Spread,
    benchmark_params,
    first_images,
    publish,
    real_searches,
    real_teacher,
    real_train,
    seconds_of,
    table,
)
from pipeline.attack.columns import Block, shard_values
from pipeline.core.status import Status
from pipeline.machine.device import keep_freed_memory, search_batch
from pipeline.networks.fast import folded, halved
from pipeline.search.boundary import Problem, judge, margin_of, probability_margin
from pipeline.search.newton import NewtonSearch
from pipeline.search.table import search_of

TOLERANCE = 0.02
TARGETS = (1, 2, 4)
DDN = "foolbox DDN, targeted, 100 steps"  # the reference for closeness


class Counted(nn.Module):
    """A network that counts rows: one half for a forward pass, one half for a backward pass."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.equivalents = network, 0.0
        self.eval()  # some libraries would bring it back into the mode in which they found it

    def forward(self, images: Tensor) -> Tensor:
        self.equivalents += len(images) / 2
        logits: Tensor = self.network(images)
        if logits.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, gradient: Tensor) -> None:
        self.equivalents += len(gradient) / 2


class Method(NamedTuple):
    """A way to search: from networks and searches to samples (R, C, H, W)."""

    rows: int
    """How many searches are enough: slow methods do fewer."""
    targeted: bool
    run: Callable[[Counted, Counted, Searches], Tensor]


def ours(fast: Counted, teacher: Counted, todo: Searches, gradients: int, batch: int = 128) -> Tensor:
    """Return the default search, with the mean of so many gradients."""
    problem = Problem(
        images=todo.images,
        base=todo.base,
        target=todo.target,
        logits=todo.logits,
        reference=teacher,
        fast=fast,
        tolerance=TOLERANCE,
        batch_size=batch,
    )
    return todo.images + NewtonSearch(averaged=gradients)(problem).perturbation


def plain_loop(
    fast: Counted, teacher: Counted, todo: Searches, frozen: bool, batch: int = 64, steps: int = 10, eta: float = 0.3
) -> Tensor:
    """Return the rule of Heo et al. (2019) as their training loop runs it: whole batches, until every row has left.

    Args:
        frozen: leave out the gradients of the teacher's weights, which their code computes and does not use.
    """
    todo.teacher.requires_grad_(not frozen)
    mean, std = torch.tensor(MEAN).view(3, 1, 1).to(todo.images), torch.tensor(STD).view(3, 1, 1).to(todo.images)
    samples = []
    for images, base, target in zip(
        todo.images.split(batch), todo.base.split(batch), todo.target.split(batch), strict=True
    ):
        x, active = (images - mean) / std, torch.ones_like(base, dtype=torch.bool)
        for _ in range(steps):
            x.requires_grad_()
            logits = teacher(x * std + mean)
            loss = margin_of(logits, base, target)
            loss.sum().backward()
            gradient = x.grad
            active = active & (logits.argmax(1) == base)
            if not active.any():
                break
            norm = gradient.square().sum((1, 2, 3), keepdim=True).sqrt()
            step = eta * (loss.detach()[:, None, None, None] + 1e-4) * gradient / norm
            x = torch.where(active[:, None, None, None], (x.detach() - step).clamp(-2.5, 2.5), x.detach())
        samples.append((x * std + mean).detach())
    todo.teacher.requires_grad_(False).zero_grad()
    return torch.cat(samples)


def with_foolbox(
    fast: Counted, teacher: Counted, todo: Searches, attack: str, targeted: bool, **options: Any
) -> Tensor:
    """Return an attack of foolbox, by the name of its class."""
    import foolbox

    return foolbox_samples(getattr(foolbox.attacks, attack)(**options), teacher, todo, targeted)


def foolbox_samples(attack: Any, teacher: nn.Module, todo: Searches, targeted: bool) -> Tensor:
    """Return samples (R, C, H, W) of an attack that is an object of foolbox."""
    import foolbox

    model = foolbox.PyTorchModel(teacher, bounds=(0, 1), device=todo.images.device)
    criterion = foolbox.criteria.TargetedMisclassification(todo.target) if targeted else todo.base
    samples: Tensor = attack(model, todo.images, criterion, epsilons=None)[1]
    return samples


def with_torchattacks(fast: Counted, teacher: Counted, todo: Searches) -> Tensor:
    """Return DeepFool of torchattacks, with as many steps as foolbox takes at most."""
    import torchattacks

    samples: Tensor = torchattacks.DeepFool(teacher, steps=50)(todo.images, todo.base)
    return samples


METHODS = {
    "newton (ours)": Method(512, True, partial(ours, gradients=3)),
    "newton, mean of 2 gradients": Method(512, True, partial(ours, gradients=2)),
    "newton, mean of 7 gradients": Method(512, True, partial(ours, gradients=7)),
    "plain loop of the paper's rule, as released": Method(512, True, partial(plain_loop, frozen=False)),
    "the same, teacher frozen": Method(512, True, partial(plain_loop, frozen=True)),
    DDN: Method(256, True, partial(with_foolbox, attack="DDNAttack", targeted=True, steps=100)),
    "foolbox L2 DeepFool": Method(48, False, partial(with_foolbox, attack="L2DeepFoolAttack", targeted=False)),
    "torchattacks DeepFool": Method(24, False, with_torchattacks),
}


@click.command()
@click.option("--runs", default=5, show_default=True, help="Runs of each method, in turn.")
@click.option("--threads", default=2, show_default=True, help="Of the CPU, in one process.")
@click.option("--device", default="cpu", show_default=True, help="Where to search.")
def main(runs: int, threads: int, device: str) -> None:
    """Search with every method, on the same images with the same network.

    Example: python -m benchmarks.attack
    """
    torch.set_num_threads(threads)
    keep_freed_memory()  # as all stages do; for every method here
    todo = real_searches(max(method.rows for method in METHODS.values()), torch.device(device))
    plain, half = folded(todo.teacher), halved(folded(todo.teacher))
    samples: dict[str, Tensor] = {}
    rates: dict[str, list[float]] = {name: [] for name in METHODS}
    cost: dict[str, float] = {}
    for _ in tqdm(range(runs), unit="run", disable=None):
        for name, method in METHODS.items():
            part = Searches(todo.teacher, *(tensor[: method.rows] for tensor in todo[1:]))
            fast, teacher = Counted(half), Counted(todo.teacher)
            seconds, samples[name] = seconds_of(partial(method.run, fast, teacher, part), todo.images.device)
            rates[name].append(method.rows / seconds)
            cost[name] = (fast.equivalents + teacher.equivalents) / method.rows
    records = [_record(name, todo, samples, rates[name], cost[name]) for name in METHODS]
    text = table([_row(record, records) for record in records])
    targets = _targets(todo.images.device, runs)
    text += f"\n\n{_gradients(plain, half, todo)}\n\n" + table([_targets_row(record, targets) for record in targets])
    publish("attack", todo.images.device, records + targets, text)


@torch.no_grad()
def _record(
    name: str, todo: Searches, samples: dict[str, Tensor], rates: list[float], equivalents: float
) -> dict[str, Any]:
    """Return figures of one method; where the samples are is judged by the teacher, in float32."""
    found, rows = samples[name], len(samples[name])
    logits, base, target = todo.teacher(found), todo.base[:rows], todo.target[:rows]
    if not METHODS[name].targeted:
        target = logits.scatter(1, base[:, None], -torch.inf).argmax(1)
    distance = {key: (each - todo.images[: len(each)]).flatten(1).norm(dim=1) for key, each in samples.items()}
    both = min(rows, len(distance[DDN]))
    on_boundary = judge(logits, base, target, TOLERANCE) == Status.CONVERGED
    margin = probability_margin(margin_of(logits, base, target))
    return {
        "method": name,
        "searches": rows,
        "samples_per_second": Spread.of(rates)._asdict(),
        "equivalents": equivalents,
        "on_boundary": float(on_boundary.float().mean()),
        "margin_median": float(margin.median()),
        "margin_p95": float(margin.quantile(0.95)),
        "distance_over_ddn": float(distance[name][:both].median() / distance[DDN][:both].median())
        if METHODS[name].targeted
        else None,
    }


def _row(record: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, str]:
    first, own = (each["samples_per_second"]["median"] for each in (records[0], record))
    over_ddn = record["distance_over_ddn"]
    return {
        "search": record["method"],
        "n": str(record["searches"]),
        "samples/s": Spread(**record["samples_per_second"]).text(1),
        "ours is faster by": f"{first / own:.2f}",
        "gradient equivalents": f"{record['equivalents']:.1f}",
        "on the boundary": f"{record['on_boundary']:.1%}",
        "margin, median / p95": f"{record['margin_median']:.4f} / {record['margin_p95']:.4f}",
        "median L2 over DDN's": "-" if over_ddn is None else f"{over_ddn:.3f}",
    }


def _targets(device: torch.device, runs: int, rows: int = 512) -> list[dict[str, Any]]:
    """Return a block of views with 1, 2 and 4 target classes each, as the attack stage makes it, in turn."""
    params, train = benchmark_params(device.type), first_images(real_train(2 * rows), rows)
    search = search_of(real_teacher(device), params.search, search_batch(params.runtime, device), device)
    ways = {
        count: partial(
            shard_values,
            search,
            train,
            Block(0, 0, 0, rows),
            params.views,
            params.attack.model_copy(update={"targets": count}),
        )
        for count in TARGETS
    }
    found = {count: way() for count, way in ways.items()}  # warms up, too
    times: dict[int, list[float]] = {count: [] for count in TARGETS}
    for _ in range(runs):
        for count, way in ways.items():
            times[count].append(seconds_of(way, device)[0])
    records = []
    for count, values in found.items():
        done = values["status"][values["target"][:, 0] >= 0] == Status.CONVERGED
        gradients = values["evaluations"][values["target"][:, 0] >= 0].mean(0)
        records.append(
            {
                "targets": count,
                "rows": rows,
                "seconds": Spread.of(times[count])._asdict(),
                "converged": float(done.mean()),
                "gradients": gradients.tolist(),
            }
        )
    return records


def _targets_row(record: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, str]:
    seconds = Spread(**record["seconds"])
    return {
        "target classes of each view": str(record["targets"]),
        "views": str(record["rows"]),
        "seconds": seconds.text(2),
        "times as long as one": f"{seconds.median / records[0]['seconds']['median']:.2f}",
        "converged": f"{record['converged']:.1%}",
        "gradients of the first to the last target": ", ".join(f"{value:.1f}" for value in record["gradients"]),
    }


def _gradients(plain: nn.Module, half: nn.Module, todo: Searches, batch: int = 128) -> str:
    """Return what a gradient costs on each copy of the network."""
    part = Searches(todo.teacher, *(tensor[:batch] for tensor in todo[1:]))

    def gradient(network: nn.Module) -> None:
        images = part.images.clone().requires_grad_()
        torch.autograd.grad(margin_of(network(images), part.base, part.target).sum(), images)

    networks = {"reference": todo.teacher, "folded": plain, "folded, bfloat16": half}
    times: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(6):
        for name, network in networks.items():
            times[name].append(seconds_of(partial(gradient, network), todo.images.device)[0] / batch * 1e3)
    said = (f"{name} {Spread.of(values[1:]).text(2)}" for name, values in times.items())
    return f"One gradient of a batch of {batch}, ms a sample: {'; '.join(said)}."


if __name__ == "__main__":
    main()
