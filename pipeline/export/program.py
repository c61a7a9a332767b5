"""Writing a classifier as a program of one file, and running that file as its users would."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core.errors import PipelineError, StoreError, WeightsError
from pipeline.core.files import atomic_path
from pipeline.core.text import one_line
from pipeline.images.pixels import pixels
from pipeline.images.prepared import Images
from pipeline.networks.classifier import Classifier
from pipeline.networks.predict import rows_of_a_batch

SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2"}
INPUT, OUTPUT = "pixels", "logits"
METADATA = "metadata.json"  # of a .pt2 file, beside the program
TRACED_ROWS = 2  # of the batch that a program is made with: 1 would be taken for a number that never changes
ALLOWED = 1e-3  # largest difference of logits, for logits of size 1


class Checked(NamedTuple):
    """What a written file says of images, beside the network that it was made from."""

    images: int
    largest_difference: float
    """Of a logit."""
    same_class: int
    """Images with the same top class."""


def export(model: Classifier, class_names: list[str], kind: str, path: Path) -> None:
    """Write a classifier as a program: pixels (N, C, H, W) in [0, 1], float32, to logits (N, classes), for any N.

    Its metadata name the classes in the order of the logits, the image shape, the network, and mean and deviation,
    by which the program itself normalises.

    Args:
        model: the classifier.
        class_names: in the order of its logits.
        kind: `onnx`, or `pt2` for a program of torch.export.
        path: the file, which is replaced.

    Raises:
        StoreError: ONNX is asked for and not installed.
        WeightsError: the network cannot be made a program.
    """
    kinds: dict[str, Callable[[Classifier, dict[str, str], Path], None]] = {"onnx": _write_onnx, "pt2": _write_pt2}
    if kind == "onnx":
        _check_onnx()
    known = model.architecture
    metadata = {
        "classes": json.dumps(class_names),
        "image_shape": json.dumps(known.image_shape),
        "input": "pixels in [0, 1], float32 (N, C, H, W); normalised inside by mean and std",
        "mean": json.dumps(known.mean),
        "network": known.network,
        "std": json.dumps(known.std),
    }
    try:
        with atomic_path(path) as temporary, _quiet():
            kinds[kind](model.eval(), metadata, temporary)
    except (PipelineError, OSError):
        raise
    except Exception as error:  # torch raises all kinds of a network that it cannot follow
        raise WeightsError(f"{known.network}: cannot be exported to {kind}: {one_line(error)[:300]}") from None


def check(path: Path, kind: str, model: Classifier, images: Images) -> Checked:
    """Run a written file on images, and compare it with the network.

    Args:
        path: the file.
        kind: `onnx` or `pt2`.
        model: what it was made from.
        images: (N, C, H, W) uint8.

    Raises:
        WeightsError: its logits are others than those of the network.
    """
    run = {"onnx": _onnx_runner, "pt2": _pt2_runner}[kind](path)
    rows = rows_of_a_batch(images.shape[1:])
    batches = [pixels(torch.from_numpy(images[start : start + rows])) for start in range(0, len(images), rows)]
    with torch.no_grad():
        wanted = torch.cat([model.eval()(batch) for batch in batches])
    found = torch.cat([run(batch) for batch in batches])
    difference = float((found - wanted).abs().max())
    if not difference <= ALLOWED * max(1.0, float(wanted.abs().max())):
        raise WeightsError(
            f"{path}: its logits differ from those of the network by up to {difference:.2g} on {len(images)} images: "
            "do not use it"
        )
    return Checked(len(images), difference, int((found.argmax(1) == wanted.argmax(1)).sum()))


def _check_onnx() -> None:
    try:
        import onnxruntime  # noqa: F401 (whether they are there)
        import onnxscript  # noqa: F401
    except ImportError:
        raise StoreError("ONNX is not installed: pip install '.[export]', or export --to pt2") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what exporters print of their progress to themselves."""
    before = logging.root.manager.disable
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def _example(model: Classifier) -> tuple[tuple[Tensor], dict[str, Any]]:
    """Return what a program is made with: a batch, and that its first dimension may be any."""
    return (model.black_images(TRACED_ROWS),), {"images": {0: torch.export.Dim("batch", min=1)}}


def _write_onnx(model: Classifier, metadata: dict[str, str], path: Path) -> None:
    images, shapes = _example(model)
    program = torch.onnx.export(
        model, images, dynamo=True, dynamic_shapes=shapes, input_names=[INPUT], output_names=[OUTPUT], verbose=False
    )
    assert program is not None
    program.model.metadata_props.update(metadata)
    program.save(path, external_data=False)


def _write_pt2(model: Classifier, metadata: dict[str, str], path: Path) -> None:
    images, shapes = _example(model)
    program = torch.export.export(model, images, dynamic_shapes=shapes)
    with open(path, "wb") as file:  # by its name, torch would judge it
        torch.export.save(program, file, extra_files={METADATA: json.dumps(metadata)})


def _onnx_runner(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        logits: NDArray[np.float32] = session.run([OUTPUT], {INPUT: images.numpy()})[0]
        return torch.from_numpy(logits)

    return run


def _pt2_runner(path: Path) -> Callable[[Tensor], Tensor]:
    program = torch.export.load(path).module()

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = program(images)
        return logits

    return run
