"""What a pixel is to a network: the definition of pixel space."""

from __future__ import annotations

import torch
from torch import Tensor


def pixels(images: Tensor) -> Tensor:
    """Return images as every network here takes them: float32 in [0, 1], the bytes divided by 255.

    The same bits on every device.

    Args:
        images: uint8, any shape.

    Example:
        >>> import torch
        >>> pixels(torch.tensor([0, 51, 255], dtype=torch.uint8))
        tensor([0.0000, 0.2000, 1.0000])
    """
    # By a tensor: CUDA multiplies by the reciprocal of a number, which rounds otherwise for half of all bytes.
    return images.float() / torch.full((), 255.0, device=images.device)
