"""The errors that a user can cause and mend. Commands print them in one line, without a traceback."""


class PipelineError(Exception):
    """Something that a user can mend; the message says what and how."""


class ParameterError(PipelineError):
    """A parameter is unknown, of the wrong type or out of range."""


class DataError(PipelineError):
    """A prepared dataset is missing, damaged or unusable."""


class WeightsError(PipelineError):
    """A weights file is missing, unsafe, damaged or of another network."""


class ShardError(PipelineError):
    """A sample dataset (shards and manifest) is missing, damaged or does not belong to what it is used with."""


class StoreError(PipelineError):
    """A file cannot be written or the private store is in use by another process."""


class WorkerError(PipelineError):
    """Workers cannot be started or reached, are lost, or have other files than this process."""


class TrainingError(PipelineError):
    """Training cannot go on, for example because the loss is not finite."""


class PipelineWarning(UserWarning):
    """Something that a user may want to know although it stops nothing. Commands say it in one line, once."""


def known_problem(error: Exception) -> str | None:
    """Return what an error of torch means, of those that users can do something about; it has no types for them."""
    text = f"{type(error).__name__}: {error}"
    if any(sign in text for sign in ("MemoryError", "can't allocate memory", "out of memory")):
        return "out of memory: lower training.batch_size or runtime.search_batch"
    if any(sign in text for sign in ("gloo", "NCCL", "DistNetworkError", "DistBackendError")):
        return "another process of this training is gone: run again, what is finished is kept"
    return None


def shown(text: str, longest: int = 200) -> str:
    """Return text that a stranger may have written, within one line: cut, and what cannot be printed escaped.

    >>> shown("one\\ntwo", longest=6)
    'one\\\\ntw...'
    """
    start = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:longest])
    return start if len(text) <= longest else f"{start}..."
