"""The names of networks, and what they mean. No torch import, unless a name is one of torchvision's or timm's."""

import re

from pipeline.core.extensions import is_own, own_object

MLP_NAME = re.compile(r"mlp([1-9]\d*)w([1-9]\d*)")
RESNET_NAME = re.compile(r"resnet(\d+)(?:w(\d+))?")
LIBRARY_NAME = re.compile(r"(cifar|torchvision|timm)\.([A-Za-z0-9_.]+)")
CIFAR_NAMES = (
    "resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet8x4", "resnet32x4",
    "resnet50", "wrn_16_1", "wrn_16_2", "wrn_40_1", "wrn_40_2", "vgg8", "vgg11", "vgg13", "mobilenetv2",
    "shufflenetv1", "shufflenetv2",
)  # fmt: skip


def check_network(name: str) -> None:
    """Refuse a name that no network has.

    Names: `resnet<depth>` with depth 6n + 2 (8, 14, 20, 26, ...), optionally `w<channels>` of the first group
    (default 16), as `resnet8w4`; `mlp<hidden layers>w<units>`, as `mlp2w32`; `cifar.<name>` with one of `CIFAR_NAMES`
    for those of the CIFAR-100 comparison; `torchvision.<name>` and `timm.<name>` for the classifiers of these
    libraries; `own.<module>.<function>` for those of the user.

    Raises:
        ValueError: no network has that name, or the library is not installed.
    """
    if is_own(name):
        own_object(name)
        return
    match = LIBRARY_NAME.fullmatch(name)
    if not match:
        if mlp_size(name) is None:
            resnet_size(name)
    elif match[1] == "cifar":
        if match[2] not in CIFAR_NAMES:
            raise ValueError(f"unknown, expected one of: {', '.join(f'cifar.{known}' for known in CIFAR_NAMES)}")
    elif match[1] == "torchvision":
        from torchvision import models

        if match[2] not in models.list_models(module=models):
            raise ValueError(f"torchvision has no classifier '{match[2]}'")
    else:
        try:
            import timm
        except ImportError:
            raise ValueError("timm is not installed: pip install 'boundary-distillation[timm]'") from None
        if not timm.is_model(match[2]):
            raise ValueError(f"timm has no model '{match[2]}'")


def mlp_size(name: str) -> tuple[int, int] | None:
    """Return hidden layers and units of a perceptron by its name: (2, 32) of `mlp2w32`; None of another network."""
    match = MLP_NAME.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def resnet_size(name: str) -> tuple[int, int]:
    """Return depth and width of a ResNet's name: `resnet20` is (20, 16), `resnet8w4` is (8, 4).

    Raises:
        ValueError: it is no such name.

    Example:
        >>> resnet_size("resnet20"), resnet_size("resnet8w4")
        ((20, 16), (8, 4))
    """
    match = RESNET_NAME.fullmatch(name)
    depth, width = (int(match[1]), int(match[2] or 16)) if match else (0, 0)
    if depth < 8 or (depth - 2) % 6 or width < 1:
        raise ValueError(
            "expected a network resnet<6n+2> (8, 14, 20, 26, ...), one with its width, as resnet8w4, "
            "mlp<layers>w<units>, cifar.<name>, torchvision.<name>, timm.<name> or own.<module>.<function>"
        )
    return depth, width
