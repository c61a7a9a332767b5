"""How views are drawn, as `views` of params.yaml and `augmentation` of a manifest both say it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Rule(Protocol):
    """How views are drawn: `views` in params.yaml, `augmentation` in a manifest."""

    @property
    def padding(self) -> int:
        """Black pixels around an image before a crop of the view's size."""

    @property
    def flip(self) -> bool:
        """Whether half of the views are mirrored."""

    @property
    def scale(self) -> tuple[float, float] | None:
        """Least and largest share of the image in a crop, which is then resized; None for crops of the view's size."""

    @property
    def ratio(self) -> tuple[float, float]:
        """Least and largest width by height of a crop that is resized."""

    @property
    def jitter(self) -> tuple[float, float, float]:
        """By how much brightness, contrast and saturation are multiplied at most, more or less than 1."""


def takes_boxes(rule: Rule, image: Sequence[int], size: Sequence[int]) -> bool:
    """Return whether crops are told with height and width: where more is drawn than a place in the padded image."""
    return rule.scale is not None or any(rule.jitter) or tuple(image) != tuple(size)
