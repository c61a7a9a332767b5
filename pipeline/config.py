"""The parameters, as in params.yaml: what exists, of which type, in which range.

Anything unknown, of the wrong type or out of range is refused by name before any work starts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

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

    name: Literal["digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "svhn", "imagefolder", "spirals"]
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

    search: Literal["newton", "heo2019", "heo2019_probabilities", "deepfool", "fgsm", "random"] = Field(
        description="newton; the others are for comparison, and few or none of their samples are on the boundary"
    )
    views: Count = Field(description="views of every training image")
    targets: Count = Field(description="target classes per view")
    seed: Seed = Field(description="of views and target classes: one draw of the dataset")
    tolerance: Annotated[float, Field(gt=0, le=1)] = Field(description="largest probability margin at the boundary")
    max_gradients: Annotated[int, Field(ge=1, le=1000)] = Field(description="per sample, for newton")
    rows_per_shard: Annotated[int, Field(ge=1, le=1_000_000)]
    embed_images: bool = Field(description="store the views, so that students need no prepared data")
    compression: Literal["none", "gzip"]

    @model_validator(mode="after")
    def _targets_fit(self) -> Attack:
        if self.search == "deepfool" and self.targets > 1:
            raise ValueError("search 'deepfool' goes to the nearest class, so it takes 'targets' 1")
        return self


class Card(Section):
    """What the card of the published samples states; null where nothing is stated. No shard depends on it."""

    title: Line | None = Field(description="by default, what it is in general")
    licence: Line | None = Field(description="of the images: SPDX identifier, or words")
    source: Line | None = Field(description="of the images: words or URL")
    terms: Line | None = Field(description="of use, where there are more than the licence says")
    url: Annotated[Line, Field(pattern=r"^https?://\S+$")] | None = Field(description="where the samples are published")


class Hinton(Section):
    """Softened outputs of the teacher (Hinton et al., 2015), without the factor T^2, as in the code of Heo et al."""

    temperature: Positive
    start: NotNegative = Field(description="weight at the start of training")
    end: NotNegative = Field(description="weight at the end, linear in between")


class Bss(Section):
    """Softened outputs of the teacher on boundary-supporting samples (Heo et al., 2019)."""

    temperature: Positive
    start: NotNegative = Field(description="weight at the start of training")
    zero_at: Annotated[float, Field(gt=0, le=1)] = Field(description="progress of training at which the weight is 0")
    fraction: Annotated[float, Field(gt=0, le=1)] = Field(description="of the batch, at most, in this loss")
    moves_statistics: bool = Field(description="the samples move batch norm's running statistics")
    converged_only: bool = Field(description="leave out samples that are not on the boundary")


class Layers(Section):
    """Features of student and teacher that are compared: outputs of named layers, pair by pair."""

    student_layers: Annotated[list[str], Field(min_length=1)]
    teacher_layers: Annotated[list[str], Field(min_length=1)]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The student's layer and the teacher's, of each pair."""
        return list(zip(self.student_layers, self.teacher_layers, strict=True))

    @model_validator(mode="after")
    def _layers_are_pairs(self) -> Layers:
        if len(self.student_layers) != len(self.teacher_layers):
            raise ValueError("'student_layers' and 'teacher_layers' name as many layers, pair by pair")
        return self


class FitNet(Layers):
    """Hints: the teacher's features by regression, in a first stage of its own (Romero et al., 2015)."""

    first_stage: Fraction = Field(description="of the epochs, spent on this loss alone")


class At(Layers):
    """Activation-based attention maps (Zagoruyko and Komodakis, 2017)."""

    weight: Positive


class Fsp(Layers):
    """Flow of the solution procedure, in a first stage of its own (Yim et al., 2017)."""

    first_stage: Fraction = Field(description="of the epochs, spent on this loss alone")
    weight: Positive

    @model_validator(mode="after")
    def _layers_make_a_flow(self) -> Fsp:
        if len(self.student_layers) < 2:
            raise ValueError("'student_layers' names at least two layers: the flow is from each to the next one")
        return self


class Dkd(Section):
    """Decoupled distillation of the label's class and of the others (Zhao et al., 2022)."""

    temperature: Positive
    target: NotNegative = Field(description="weight of the label's class against all others, alpha in the paper")
    non_target: NotNegative = Field(description="weight of the other classes among themselves, beta in the paper")
    warm_up: Annotated[float, Field(ge=0, le=1)] = Field(description="progress of training at which both are whole")


class Rkd(Layers):
    """Distances and angles between the embeddings of a batch (Park et al., 2019)."""

    distance: NotNegative = Field(description="weight of the distances")
    angle: NotNegative = Field(description="weight of the angles")


class Method(Section):
    """A way to train a student: cross-entropy with the labels and the losses that are named, from one source."""

    source: Literal["fresh", "shards", "online"] = Field(
        description="fresh augmentation, published shards, or fresh augmentation with the teacher in the loop"
    )
    hinton: Hinton | None = None
    bss: Bss | None = None
    fitnet: FitNet | None = None
    at: At | None = None
    fsp: Fsp | None = None
    dkd: Dkd | None = None
    rkd: Rkd | None = None

    @property
    def losses(self) -> dict[str, Section]:
        """The parameters of each loss beside cross-entropy, by name."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in values.items() if isinstance(value, Section)}

    @property
    def reads_features(self) -> bool:
        """Whether the teacher itself must be at hand, and not its logits alone."""
        return any(isinstance(loss, Layers) for loss in self.losses.values())

    @model_validator(mode="after")
    def _source_and_losses_fit(self) -> Method:
        if self.source == "fresh" and self.losses:
            raise ValueError("source 'fresh' has no teacher: losses take 'shards' or 'online'")
        if self.source != "fresh" and not self.losses:
            known = [name for name in type(self).model_fields if name != "source"]
            raise ValueError(f"source '{self.source}' needs at least one loss: {', '.join(known)}")
        if self.fitnet and self.fsp:
            raise ValueError("'fitnet' and 'fsp' both want a first stage of their own: take one of them")
        return self


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
    return check_params(read_yaml(path), str(path))


def read_yaml(path: Path) -> Any:
    """The values of a YAML file.

    Raises:
        ParameterError: it is missing or no YAML.
    """
    try:
        return YAML(typ="safe", pure=True).load(path)
    except OSError as error:
        raise ParameterError(f"{path}: cannot be read: {error.strerror}") from None
    except (YAMLError, ValueError) as error:
        raise ParameterError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


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
    model: type[Section] = Params
    if location[:1] == ("method",):
        model, location = Method, location[2:]  # after the method's name
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        kinds = get_args(annotation) or (annotation,)
        (model,) = (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section))
    return sorted(model.model_fields)
