"""The parameters, as in params.yaml: what exists, of which type, in which range.

Anything unknown, of the wrong type or out of range is refused by name before any work starts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.errors import ParameterError
from pipeline.networks import check_network

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# Names end up in DVC stage names, paths and keys.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]+$")]


def _known_network(name: str) -> str:
    check_network(name)
    return name


NetworkName = Annotated[str, AfterValidator(_known_network)]


def _printable_line(text: str) -> str:
    if not text.strip() or not text.isprintable():  # line breaks are not printable
        raise ValueError("expected one line of printable text (longer text in YAML: '>-'), or null")
    return text.strip()


Line = Annotated[str, AfterValidator(_printable_line)]


class Section(BaseModel):
    """A group of parameters: strict types, no unknown keys, not to be changed."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Dataset(Section):
    """The images and how views of them are drawn."""

    name: Literal["digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "svhn", "imagefolder"]
    path: Annotated[str, Field(min_length=1)] = Field(description="of an imagefolder; where others are downloaded to")
    image_size: tuple[Count, Count] | None = Field(strict=False, description="height and width to resize to")
    channels: Literal[1, 3] | None = Field(description="gray or RGB; by default, as the first image")
    train_images: Count | None = Field(description="of the training part, at most, evenly by class")
    skip_bad: bool = Field(description="leave out images that cannot be read, instead of an error")
    seed: Seed = Field(description="of the splits")
    test_fraction: Fraction = Field(description="split off where the dataset has no test part of its own")
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        description="split off the training part, by class, where there is no validation part; 0 for none"
    )
    padding: Annotated[int, Field(ge=0, le=64)] = Field(description="black pixels around the image, then a random crop")
    flip: bool = Field(description="mirror half of the views")


class Training(Section):
    """One run of stochastic gradient descent with momentum."""

    epochs: Count
    batch_size: Count
    learning_rate: Positive
    momentum: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: NotNegative
    milestones: list[Fraction] = Field(description="fractions of the epochs at which the rate is divided")
    divisor: Annotated[float, Field(ge=1)] = Field(description="of the learning rate at each milestone")
    precision: Literal["32-true", "bf16-mixed"]


class Teacher(Section):
    """The network to distil: trained here, or imported from a safetensors file."""

    network: NetworkName
    weights: Annotated[str, Field(min_length=1)] | None = Field(
        description="safetensors file to import instead of training"
    )
    mean: list[float] | None = Field(description="per channel, to normalise by; by default, of the training split")
    std: list[Positive] | None = Field(description="per channel, to normalise by; by default, of the training split")
    seed: Seed
    training: Training

    @model_validator(mode="after")
    def _normalisation_is_whole(self) -> Teacher:
        if len(self.mean or []) != len(self.std or []):
            raise ValueError("'mean' and 'std' take as many values, one for each channel")
        return self


class Attack(Section):
    """The search for boundary-supporting samples and how they are stored."""

    search: Literal["newton", "heo2019"]
    views: Count = Field(description="views of every training image")
    targets: Count = Field(description="target classes per view")
    seed: Seed = Field(description="of views and target classes: one draw of the dataset")
    tolerance: Annotated[float, Field(gt=0, le=1)] = Field(description="largest probability margin at the boundary")
    max_gradients: Annotated[int, Field(ge=1, le=1000)] = Field(description="per sample, for newton")
    rows_per_shard: Annotated[int, Field(ge=1, le=1_000_000)]
    embed_images: bool = Field(description="store the views, so that students need no prepared data")
    compression: Literal["none", "gzip"]


class Card(Section):
    """What the card of the published samples states; null where nothing is stated. No shard depends on it."""

    title: Line | None = Field(description="by default, what it is in general")
    licence: Line | None = Field(description="of the images: SPDX identifier, or words")
    source: Line | None = Field(description="of the images: words or URL")
    terms: Line | None = Field(description="of use, where there are more than the licence says")
    url: Annotated[Line, Field(pattern=r"^https?://\S+$")] | None = Field(description="where the samples are published")


class Method(Section):
    """One column of the comparison: a way to train a student, and where its inputs come from."""

    algorithm: Literal["original", "hinton", "bss"]
    source: Literal["fresh", "shards", "online"] = Field(
        description="fresh augmentation, published shards, or fresh augmentation with the teacher in the loop"
    )

    @model_validator(mode="after")
    def _source_fits(self) -> Method:
        if (self.source == "fresh") != (self.algorithm == "original"):
            raise ValueError("'original' takes source 'fresh', the other algorithms take 'shards' or 'online'")
        return self


class Distillation(Section):
    """Weights of the losses; progress e / E runs from 0 to 1 over training."""

    temperature: Positive
    hinton_start: NotNegative = Field(description="alpha at the start")
    hinton_end: NotNegative = Field(description="alpha at the end, linear in between")
    boundary_start: NotNegative = Field(description="beta at the start")
    boundary_zero_at: Annotated[float, Field(gt=0, le=1)] = Field(description="progress at which beta reaches 0")
    boundary_fraction: Annotated[float, Field(gt=0, le=1)] = Field(description="of the batch, at most, in that loss")
    boundary_moves_statistics: bool = Field(description="boundary samples move batch norm's running statistics")


class Evaluation(Section):
    """What is measured on the test split."""

    similarity_images: Count | None = Field(description="for MagSim and AngSim, about, evenly spread; by default all")


class Runtime(Section):
    """The machine: changes results by rounding at most, and is in no stage's parameters."""

    device: Literal["auto", "cpu", "cuda"]
    devices: Count = Field(description="GPUs, or CPU processes, that share the batches of a training run")
    threads: Count | None = Field(description="of the CPU; by default all cores")
    workers: Count | None = Field(
        description="seeds trained, or shards made, side by side on a CPU; by default one a core"
    )
    search_batch: Count | None = Field(description="samples per batch of the boundary search; by default by device")


class Params(Section):
    """All of params.yaml."""

    dataset: Dataset
    teacher: Teacher
    attack: Attack
    card: Card
    students: Annotated[list[NetworkName], Field(min_length=1)] = Field(description="networks to train")
    methods: Annotated[list[Name], Field(min_length=1)] = Field(description="names from `method` to train them with")
    seeds: Count = Field(description="runs of each student and method")
    method: dict[Name, Method]
    training: Training = Field(description="of the students")
    distillation: Distillation
    evaluation: Evaluation
    runtime: Runtime

    @model_validator(mode="after")
    def _lists_are_sound(self) -> Params:
        for name in ("students", "methods"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"'{name}' names something twice: {', '.join(values)}")
        unknown = [name for name in self.methods if name not in self.method]
        if unknown:
            raise ValueError(f"'methods' names '{unknown[0]}', expected names from 'method': {', '.join(self.method)}")
        return self


def load_params(path: Path) -> Params:
    """Read and check a parameter file.

    Raises:
        ParameterError: the file is missing or no YAML, or a parameter is not as declared; names the key, what was
            expected and what came.
    """
    try:
        values = YAML(typ="safe", pure=True).load(path)
    except OSError as error:
        raise ParameterError(f"{path}: cannot be read: {error.strerror}") from None
    except (YAMLError, ValueError) as error:
        raise ParameterError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    return check_params(values, str(path))


def check_params(values: Any, source: str) -> Params:
    """Check parameters that are already parsed; `source` names them in errors."""
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise ParameterError(f"{source}: " + "; ".join(map(_in_words, error.errors()))) from None


def _in_words(error: Any) -> str:
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown parameter; known here: {', '.join(_fields_at(error['loc'][:-1]))}"
    if error["type"] == "missing":
        return f"{key}: missing"
    message = error["msg"].removeprefix("Value error, ")
    given = error["input"]
    if error["type"] == "value_error" and isinstance(given, dict):  # a check of several parameters, which it names
        return f"{key}: {message}" if key else message
    received = repr(given) if isinstance(given, (str, int, float, type(None))) else f"a {type(given).__name__}"
    return f"{key or 'all'}: {message} (got {received})"


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    """The parameters that exist in a section."""
    if location[:1] == ("method",):
        return sorted(Method.model_fields)
    model: type[Section] = Params
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, Section)
        model = annotation
    return sorted(model.model_fields)
