"""The names of networks, and what they mean."""

import re

RESNET_NAME = re.compile(r"resnet(\d+)(?:w(\d+))?")


def resnet_size(name: str) -> tuple[int, int]:
    """Depth and width of a network name: `resnet20` is (20, 16), `resnet8w4` is (8, 4).

    Raises:
        ValueError: no network has that name.
    """
    match = RESNET_NAME.fullmatch(name)
    depth, width = (int(match[1]), int(match[2] or 16)) if match else (0, 0)
    if depth < 8 or (depth - 2) % 6 or width < 1:
        raise ValueError("expected a network resnet<6n+2> (8, 14, 20, 26, ...) or one with its width, as resnet8w4")
    return depth, width
