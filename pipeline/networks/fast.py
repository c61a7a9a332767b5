"""Faster copies of a network, from which searches take their gradients."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from torch import fx, nn

from pipeline.core.errors import PipelineWarning
from pipeline.core.text import one_line
from pipeline.networks.classifier import Classifier, channels_last_, move_to_


def frozen(model: Classifier, device: torch.device) -> Classifier:
    """Return a copy of a network on a device, in evaluation mode and without gradients of its weights."""
    return move_to_(copy.deepcopy(model), device).eval().requires_grad_(False)


def folded(model: Classifier) -> Classifier:
    """Return a frozen copy for inference in which batch norm is part of the convolutions: fewer passes over memory.

    Its logits differ from the model's by rounding only. Of a network that cannot be traced, or whose folded copy
    disagrees, it is a plain copy, and a `PipelineWarning` says so.
    """
    from torch.fx.experimental.optimization import fuse  # imported here: only searches need it

    plain = copy.deepcopy(model).eval().requires_grad_(False)
    fast = _if_it_agrees(lambda: fuse(plain.network), plain, 1e-3, "its batch norms are not folded")
    if channels_last_(plain):  # which fails in silence; a traced network prints where
        fast.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return fast


def _if_it_agrees(make: Callable[[], nn.Module], plain: Classifier, tolerance: float, otherwise: str) -> Classifier:
    """Return a classifier with a faster network, frozen, where the plain one is.

    It is the plain one, with a warning, if the network cannot be made, or its logits are not nearly those of that.
    """
    shape, generator = plain.architecture.image_shape, torch.Generator().manual_seed(0)
    probe = torch.rand(4, *shape, generator=generator).to(plain.mean.device)
    try:
        fast = Classifier(make(), plain.architecture, plain.channels).to(plain.mean.device)
        fast = fast.eval().requires_grad_(False)
        with torch.no_grad():
            expected = plain(probe)
            error = float((fast(probe) - expected).norm() / (1 + expected.norm()))
        if error <= tolerance:
            return fast
        reason = f"logits would be off by {error:.2g}"
    except Exception as problem:  # torch.fx and networks that cannot be changed raise all kinds
        reason = f"{type(problem).__name__}: {one_line(problem)}"
    name = plain.architecture.network
    warnings.warn(f"network '{name}': {otherwise}, searches take longer ({reason})", PipelineWarning, stacklevel=3)
    return plain


def halved(model: Classifier) -> Classifier:
    """Return a copy of a folded network that computes in bfloat16 between its first and its last layer, for gradients.

    About twice as fast where the machine has instructions for it. Pixels and logits stay float32: a small perturbation
    would be lost in rounded pixels. On another machine, or of a network that was not folded, it is the model. So it is
    where the network cannot be split so, and a `PipelineWarning` says it.
    """
    network = model.network
    if not isinstance(network, fx.GraphModule) or not _has_bfloat16(model.mean.device):
        return model
    return _if_it_agrees(lambda: _halved(network), model, 0.1, "its gradients are in float32, not bfloat16")


def _halved(network: fx.GraphModule) -> nn.Module:
    network = copy.deepcopy(network).to(torch.bfloat16)
    graph = network.graph
    (pixels,) = (node for node in graph.nodes if node.op == "placeholder")
    (last,) = next(node for node in graph.nodes if node.op == "output").args
    for node in (*pixels.users, last):
        if not list(network.get_submodule(node.target).float().parameters()):  # raises if it is no module
            raise TypeError(f"'{node.target}' is no layer")
    with graph.inserting_before(last):
        last.update_arg(0, graph.call_method("float", last.args))
    for node in pixels.users:
        with graph.inserting_after(node):
            rounded = graph.call_method("bfloat16", (node,))
        node.replace_all_uses_with(rounded, lambda user, rounded=rounded: user is not rounded)
    network.recompile()
    return network


def _has_bfloat16(device: torch.device) -> bool:
    """Return whether a device computes in bfloat16 faster than in float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return device.type == "cpu" and bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
