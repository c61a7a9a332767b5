"""How the search for one boundary-supporting sample ended."""

from enum import IntEnum


class Status(IntEnum):
    """Values of the shard column `status`; only CONVERGED samples are used in training."""

    CONVERGED = 0
    BASE_MISCLASSIFIED = 1
    NOT_CONVERGED = 2
    THIRD_CLASS = 3
    BAD_GRADIENT = 4
