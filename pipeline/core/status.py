"""How the search for one boundary-supporting sample ended."""

from enum import IntEnum


class Status(IntEnum):
    """Values of the shard column `status`; samples other than CONVERGED are used in training only when asked for."""

    CONVERGED = 0
    BASE_MISCLASSIFIED = 1
    NOT_CONVERGED = 2
    THIRD_CLASS = 3
    BAD_GRADIENT = 4
