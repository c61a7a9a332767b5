"""The parameters, as in params.yaml: what exists, of which type, in which range.

Anything unknown, of the wrong type or out of range is refused by name before any work starts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.core.errors import ParameterError
from pipeline.core.extensions import find_loss, known_losses, trust_own_networks, use_own_code
from pipeline.core.files import local_path
from pipeline.core.network_names import check_network
from pipeline.core.text import one_line

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Jitter = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# Names end up in DVC stage names, paths and keys.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]+$")]


UNKNOWN_LOSS = "unknown_loss"
# Parameters that had another name before.
MOVED = {
    "dataset.padding": "views.padding",
    "dataset.flip": "views.flip",
    "attack.search": "search.name",
    "attack.tolerance": "search.tolerance",
    "attack.max_gradients": "search.max_gradients",
}


def _known_network(name: str) -> str:
    check_network(name)
    return name


NetworkName = Annotated[str, AfterValidator(_known_network)]


def _printable_line(text: str) -> str:
    if not text.strip() or not text.isprintable():  # line breaks are not printable
        raise ValueError("expected one line of printable text (longer text in YAML: '>-'), or null")
    return text.strip()


Line = Annotated[str, AfterValidator(_printable_line)]
PathText = Annotated[str, Field(min_length=1), AfterValidator(lambda text: str(local_path(text)))]


class Section(BaseModel):
    """A group of parameters: strict types, no unknown keys, not to be changed."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Dataset(Section):
    """The images and their splits."""

    name: Literal["digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "svhn", "imagefolder", "spirals"]
    path: PathText = Field(description="of an imagefolder; where others are downloaded to")
    image_size: tuple[Count, Count] | None = Field(strict=False, description="height and width to resize to")
    train_size: tuple[Count, Count] | None = Field(
        None, strict=False, description="height and width of training images, of which a view is a crop of image_size"
    )
    channels: Literal[1, 3] | None = Field(description="gray or RGB; by default, as the first image")
    background: Annotated[int, Field(ge=0, le=255)] = Field(description="gray level behind transparent pixels")
    train_images: Count | None = Field(description="of the training part, at most, evenly by class")
    skip_bad: bool = Field(description="leave out images that cannot be read, instead of an error")
    seed: Seed = Field(description="of the splits")
    test_fraction: Fraction = Field(description="split off where the dataset has no test part of its own")
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        description="split off the training part, by class, where there is no validation part; 0 for none"
    )

    @model_validator(mode="after")
    def _training_images_are_larger(self) -> Dataset:
        if self.train_size is None:
            return self
        if self.image_size is None:
            raise ValueError("'train_size' needs 'image_size', the size of the views that are cut out")
        if min(t - s for t, s in zip(self.train_size, self.image_size, strict=True)) < 0:
            raise ValueError(
                f"'train_size' is at least image_size {list(self.image_size)}, got {list(self.train_size)}"
            )
        return self


class Views(Section):
    """How a view of an image is drawn."""

    padding: Annotated[int, Field(ge=0, le=64)] = Field(description="black pixels around the image, then a random crop")
    flip: bool = Field(description="mirror half of the views")
    scale: tuple[Share, Share] | None = Field(
        None, strict=False, description="range of the share of an image in a crop that is resized; null for no resizing"
    )
    ratio: tuple[Positive, Positive] = Field(
        (0.75, 1.3333), strict=False, description="range of width by height of a crop that is resized"
    )
    jitter: tuple[Jitter, Jitter, Jitter] = Field(
        (0.0, 0.0, 0.0), strict=False, description="of brightness, contrast, saturation: factors from 1 - j to 1 + j"
    )

    @model_validator(mode="after")
    def _crops_are_of_one_kind(self) -> Views:
        if self.scale and self.padding:
            raise ValueError("'padding' is around crops that are not resized: take it or 'scale'")
        for name, given in (("scale", self.scale), ("ratio", self.ratio)):
            if given and given[0] > given[1]:
                raise ValueError(f"'{name}' takes the least value, then the largest, got {list(given)}")
        return self


class Training(Section):
    """One training run."""

    epochs: Count
    batch_size: Count
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: Positive
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(description="of sgd")
    nesterov: bool = Field(False, description="of sgd: its momentum looks ahead")
    weight_decay: NotNegative
    schedule: Literal["steps", "cosine"] = Field("steps", description="how the learning rate falls")
    warm_up: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="fraction of the epochs in which the learning rate rises, linearly"
    )
    milestones: list[Fraction] = Field(description="fractions of the epochs at which the rate of 'steps' is divided")
    divisor: Annotated[float, Field(ge=1)] = Field(description="of the learning rate at each milestone")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of the labels in cross-entropy that is spread over all classes"
    )
    clip_norm: Positive | None = Field(None, description="largest norm of the gradients of a step; null for any")
    averaged: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="fraction of the epochs, at the end, whose weights are averaged"
    )
    frozen: list[Line] = Field([], description="layers that keep their weights, by the names of their modules")
    precision: Literal["32-true", "bf16-mixed"]

    @model_validator(mode="after")
    def _momentum_looks_ahead(self) -> Training:
        if self.nesterov and (self.optimizer != "sgd" or not self.momentum):
            raise ValueError("'nesterov' is of optimizer 'sgd' with a momentum above 0")
        return self


class Teacher(Section):
    """The network to distil: trained here, or imported from a safetensors file."""

    network: NetworkName
    weights: PathText | None = Field(description="safetensors file to import instead of training, or 'library'")
    pretrained: PathText | None = Field(
        description="what training goes on from: a safetensors file of the same network, or 'library'"
    )
    mean: list[float] | None = Field(description="per channel, to normalise by; by default, of the training split")
    std: list[Positive] | None = Field(description="per channel, to normalise by; by default, of the training split")
    seed: Seed
    training: Training

    @model_validator(mode="after")
    def _one_file(self) -> Teacher:
        if self.weights and self.pretrained:
            raise ValueError("'weights' is imported as it is, 'pretrained' is trained on: give one of them")
        return self

    @model_validator(mode="after")
    def _normalisation_is_whole(self) -> Teacher:
        if len(self.mean or []) != len(self.std or []):
            raise ValueError("'mean' and 'std' take as many values, one for each channel")
        return self


class Search(Section):
    """The search for a boundary-supporting sample."""

    name: Literal[
        "newton", "heo2019", "heo2019_probabilities", "deepfool", "fgsm", "random", "view", "mixup", "cutmix"
    ] = Field(description="newton; the others are for comparison, and few or none of their samples are on the boundary")
    tolerance: Annotated[float, Field(gt=0, le=1)] = Field(description="largest probability margin at the boundary")
    max_gradients: Annotated[int, Field(ge=1, le=1000)] = Field(description="per sample, for newton")
    levels: Annotated[int, Field(ge=1, le=127)] = Field(127, description="of a direction each way: fewer compress well")


class Attack(Section):
    """The samples that are made, and how they are stored."""

    views: Count = Field(description="views of every training image")
    targets: Annotated[int, Field(ge=0)] = Field(description="target classes per view; 0: no samples, logits alone")
    seed: Seed = Field(description="of views and target classes: one draw of the dataset")
    rows_per_shard: Annotated[int, Field(ge=1, le=1_000_000)]
    embed_images: bool = Field(description="store the views, so that students need no prepared data")
    compression: Literal["none", "gzip"]
    logits: Literal["float32", "float16"] = Field("float32", description="dtype of the teacher's logits on the views")
    features: bool = Field(False, description="store the teacher's penultimate features on the views")


class Card(Section):
    """What the card of the published samples states; null where nothing is stated. No shard depends on it."""

    title: Line | None = Field(description="by default, what it is in general")
    licence: Line | None = Field(description="of the images: SPDX identifier, or words")
    source: Line | None = Field(description="of the images: words or URL")
    terms: Line | None = Field(description="of use, where there are more than the licence says")
    url: Annotated[Line, Field(pattern=r"^https?://\S+$")] | None = Field(description="where the samples are published")


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


class Method(Section):
    """A way to train a student: cross-entropy with the labels and the losses that are named, from one source."""

    source: Literal["fresh", "shards", "online"] = Field(
        description="fresh augmentation, published shards, or fresh augmentation with the teacher in the loop"
    )
    cross_entropy: NotNegative = Field(1.0, description="weight of the cross-entropy with the labels")
    losses: dict[str, SerializeAsAny[Section]] = Field(
        description="parameters of each loss beside cross-entropy, by name; in a file they stand beside `source`"
    )

    @property
    def reads_features(self) -> bool:
        """Whether the teacher itself must be at hand, and not its logits alone."""
        return any(isinstance(loss, Layers) for loss in self.losses.values())

    @model_validator(mode="before")
    @classmethod
    def _losses_by_name(cls, values: Any) -> Any:
        """Take all but the method's own fields as losses, and check the parameters of each as its class has them."""
        if not isinstance(values, dict):
            return values
        losses, problems, own = {}, list[InitErrorDetails](), cls.model_fields.keys() - {"losses"}
        if "source" not in values:
            problems.append(InitErrorDetails(type="missing", loc=("source",), input=values))
        for name, given in values.items():
            if name in own or given is None:
                continue
            try:
                losses[name] = _parameters_of(str(name)).model_validate(given)
            except ValidationError as error:
                problems += [_with_place(each, name) for each in error.errors()]
            except ValueError as error:
                kind = PydanticCustomError(UNKNOWN_LOSS, "{reason}", {"reason": str(error)})
                problems.append(InitErrorDetails(type=kind, loc=(name,), input=given))
        if problems:
            raise ValidationError.from_exception_data("Method", problems)
        return {name: value for name, value in values.items() if name in own} | {"losses": losses}

    @model_serializer(mode="wrap")
    def _as_in_a_file(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Write what is not at its default, so that a parameter that is added changes no fingerprint of before."""
        values = handler(self)
        weight = {} if self.cross_entropy == 1 else {"cross_entropy": self.cross_entropy}
        losses = {}
        for name, loss in self.losses.items():
            given = loss.model_dump(exclude_defaults=True)
            losses[name] = {key: value for key, value in values["losses"][name].items() if key in given}
        return {"source": values["source"], **weight, **losses}

    @model_validator(mode="after")
    def _source_and_losses_fit(self) -> Method:
        if self.source == "fresh" and self.losses:
            raise ValueError("source 'fresh' has no teacher: losses take 'shards' or 'online'")
        if self.source != "fresh" and not self.losses:
            raise ValueError(f"source '{self.source}' needs at least one loss: {', '.join(known_losses())}")
        staged = [name for name, loss in self.losses.items() if getattr(loss, "first_stage", 0)]
        if len(staged) > 1:
            raise ValueError(f"'{staged[0]}' and '{staged[1]}' both want a first stage of their own: take one of them")
        return self


def _parameters_of(loss: str) -> type[Section]:
    """Return the section of a loss.

    Raises:
        ValueError: there is no such loss, or it has no section.
    """
    found = getattr(find_loss(loss), "Parameters", None)
    if not isinstance(found, type) or not issubclass(found, Section):
        raise ValueError(f"'{loss}' is no loss: derive it from pipeline.Term, its `Parameters` from pipeline.Section")
    return found


def _with_place(error: Any, name: str) -> InitErrorDetails:
    """Say of an error within a loss that it is there."""
    kind = PydanticCustomError(error["type"], "{reason}", {"reason": error["msg"]})
    return InitErrorDetails(type=kind, loc=(name, *error["loc"]), input=error["input"])


class Evaluation(Section):
    """What is measured on the test split."""

    similarity_images: Count | None = Field(description="for MagSim and AngSim, about, evenly spread; by default all")


class Runtime(Section):
    """The machine: changes results by rounding at most, and is in no stage's parameters."""

    device: Literal["auto", "cpu", "cuda"]
    devices: Count = Field(description="GPUs, or CPU processes, that share the batches of a training run")
    threads: Count | None = Field(description="of the CPU; by default a core each, or OMP_NUM_THREADS")
    workers: Count | None = Field(
        description="seeds trained, or shards made, side by side on a CPU; by default one a core"
    )
    search_batch: Count | None = Field(description="samples per batch of the boundary search; by default by device")


class Params(Section):
    """All of params.yaml."""

    code: PathText = Field(description="folder of the user's modules, the package `own`")
    dataset: Dataset
    views: Views
    teacher: Teacher
    search: Search
    attack: Attack
    card: Card
    students: Annotated[list[NetworkName], Field(min_length=1)] = Field(description="networks to train")
    pretrained: dict[NetworkName, PathText] = Field(
        {}, description="what training of students goes on from: a safetensors file of the same network, or 'library'"
    )
    methods: Annotated[list[Name], Field(min_length=1)] = Field(description="names from `method` to train them with")
    seeds: Count = Field(description="runs of each student and method")
    method: dict[Name, Method]
    training: Training = Field(description="of the students")
    evaluation: Evaluation
    runtime: Runtime

    @model_validator(mode="after")
    def _targets_fit(self) -> Params:
        if self.search.name == "deepfool" and self.attack.targets > 1:
            raise ValueError("search.name: 'deepfool' goes to the nearest class, so it takes attack.targets 1")
        online = [name for name in self.methods if name in self.method and self.method[name].source == "online"]
        if self.search.name in ("view", "mixup", "cutmix") and online:
            raise ValueError(f"search.name: '{self.search.name}' is for shards, but '{online[0]}' searches in the loop")
        return self

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


def load_params(path: Path | str) -> Params:
    """Read and check a parameter file.

    Raises:
        ParameterError: the file is missing or no YAML, or a parameter is not as declared; names the key, what was
            expected and what came.
    """
    return check_params(read_yaml(local_path(path)), str(path))


def read_yaml(path: Path) -> Any:
    """Return the values of a YAML file.

    Raises:
        ParameterError: it is missing or no YAML.
    """
    try:
        return YAML(typ="safe", pure=True).load(path)
    except OSError as error:
        raise ParameterError(f"{path}: cannot be read: {error.strerror}") from None
    except (YAMLError, ValueError) as error:
        raise ParameterError(f"{path}: not valid YAML: {one_line(error)}") from None


def check_params(values: Any, source: str) -> Params:
    """Check parameters that are already parsed; `source` names them in errors.

    The user's modules in the folder `code` are those that names `own.<module>.<name>` mean from then on.
    """
    if isinstance(values, dict) and isinstance(values.get("code"), str):
        use_own_code(local_path(values["code"]))
    try:
        params = Params.model_validate(values)
    except ValidationError as error:
        raise ParameterError(f"{source}: {in_words(error)}") from None
    trust_own_networks([params.teacher.network, *params.students])
    return params


def for_workers(params: Params) -> str:
    """Return parameters as JSON for `check_params` in a process that runs in another folder."""

    def whole(place: str) -> str:
        return str(Path(place).absolute())

    files = {name: given if given == "library" else whole(given) for name, given in params.pretrained.items()}
    return params.model_copy(update={"code": whole(params.code), "pretrained": files}).model_dump_json()


def in_words(error: ValidationError) -> str:
    """Return all that is wrong with values, by dotted key."""
    return "; ".join(_problem_in_words(each) for each in error.errors())


def _problem_in_words(error: Any) -> str:
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        if key in MOVED:
            return f"{key}: is called {MOVED[key]} now"
        return f"{key}: unknown parameter; known here: {', '.join(_fields_at(error['loc'][:-1]))}"
    if error["type"] == "missing":
        return f"{key}: missing"
    if error["type"] == UNKNOWN_LOSS:
        return f"{key}: {error['msg']}"
    message = error["msg"].removeprefix("Value error, ")
    given = error["input"]
    if error["type"] == "value_error" and isinstance(given, dict):  # a check of several parameters, which it names
        return f"{key}: {message}" if key else message
    received = repr(given) if isinstance(given, (str, int, float, type(None))) else f"a {type(given).__name__}"
    return f"{key or 'all'}: {message} (got {received})"


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    """Return the parameters that exist in a section."""
    model: type[BaseModel] = Params
    if location[:1] == ("method",):  # the method's name, then that of a loss
        model, location = (_parameters_of(str(location[2])), location[3:]) if len(location) > 2 else (Method, ())
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        kinds = get_args(annotation) or (annotation,)
        (model,) = (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section))
    return sorted(model.model_fields)
