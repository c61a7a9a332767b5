"""Small networks, data and parameters that the tests share: everything follows from explicit seeds."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.attack.dataset import SampleDataset
from pipeline.core.files import file_digest
from pipeline.core.parameters import Attack, Dataset, Views
from pipeline.core.parameters import Search as SearchParameters
from pipeline.core.provenance import ROOT
from pipeline.core.store import Store
from pipeline.images.prepared import Prepared, content_digest
from pipeline.losses.bss import BssTerm
from pipeline.losses.hinton import HintonTerm
from pipeline.networks.classifier import Architecture, Classifier, build
from pipeline.networks.loading import Loaded
from pipeline.networks.weights import load_weights, save_weights
from pipeline.search.table import search_of
from pipeline.training.batches import BoundaryBatch, BoundarySamples
from pipeline.training.objective import Moment, Objective

CPU = torch.device("cpu")
GRAY = Architecture("resnet8w2", 4, (1, 8, 8), (0.4,), (0.3,))


def real_data(name):
    """A file of real images or weights beside the project; where it is absent, the test is skipped."""
    path = ROOT / os.environ.get("BOUNDARY_DATA", "../shared/data") / name
    if not path.is_file():
        pytest.skip(f"{path} is absent (BOUNDARY_DATA names its folder)")
    return path


def random_images(seed, rows, shape=(1, 8, 8), low=0.0, high=1.0, dtype=torch.float32):
    """Images (rows, C, H, W), uniform in [low, high)."""
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(rows, *shape, generator=generator, dtype=torch.float64).to(dtype)


def linear_classifier(weight, bias):
    """Logits W x + c: weight (classes, C, H, W), bias (classes,); no normalisation, same dtype as the weight."""
    classes, channels, height, width = weight.shape
    layer = nn.Linear(channels * height * width, classes).to(weight.dtype)
    layer.load_state_dict({"weight": weight.flatten(1), "bias": bias})
    shape = (channels, height, width)
    architecture = Architecture("linear", classes, shape, (0.0,) * channels, (1.0,) * channels)
    model = Classifier(nn.Sequential(nn.Flatten(), layer), architecture)
    return model.to(weight.dtype).eval().requires_grad_(False)


def random_linear_classifier(seed, classes=4, shape=(1, 8, 8), dtype=torch.float64):
    """Gaussian weights; the biases put the boundaries through the middle of the box."""
    weight = torch.randn(classes, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return linear_classifier(weight.to(dtype), -0.5 * weight.flatten(1).sum(1).to(dtype))


def tiny_resnet(seed, classes=4, shape=(1, 8, 8), std=0.25, gain=4.0, dtype=torch.float32):
    """A resnet8w2 for evaluation, untrained, whose random logits depend on the image and give every class its share.

    Args:
        std: of the normalisation; the mean is 0.5.
        gain: standard deviation of the logits over uniform images.
    """
    architecture = Architecture("resnet8w2", classes, shape, (0.5,) * shape[0], (std,) * shape[0])
    return untrained(architecture, random_images(seed, 256, shape), seed, gain).to(dtype)


def untrained(architecture, images, seed=0, gain=4.0):
    """A classifier for evaluation whose random logits depend on the image and give every class its share of images."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = build(architecture)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # one pass sets the running statistics
        model.train()(images)
        logits = model.eval()(images)
        layer = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        scale = gain / logits.std()
        layer.bias.copy_((layer.bias - logits.mean(0)) * scale)
        layer.weight.mul_(scale)
    return model.eval().requires_grad_(False)


def top_two(model, images):
    """The best and the second best class of each image, (R,) each."""
    order = model(images).argsort(1, descending=True)
    return order[:, 0], order[:, 1]


def other_classes(base, classes, seed):
    """A random class for each row, never the row's base class."""
    steps = torch.randint(1, classes, base.shape, generator=torch.Generator().manual_seed(seed))
    return (base + steps) % classes


def random_prepared(seed, rows, shape=(1, 8, 8), classes=4, model=None):
    """Images of random 2x2 patches with random labels, or with a model's own top classes."""
    generator = np.random.default_rng(seed)
    channels, height, width = shape
    patches = generator.integers(0, 256, (rows, channels, -(-height // 2), -(-width // 2)), np.uint8)
    images = np.ascontiguousarray(patches.repeat(2, 2).repeat(2, 3)[:, :, :height, :width])
    labels = generator.integers(0, classes, rows)
    if model is not None:
        labels = model(torch.from_numpy(images).float() / 255).argmax(1).numpy()
    names = tuple(f"class {number}" for number in range(classes))
    return in_memory(images, labels, names, (0.5,) * channels, (0.25,) * channels)


def in_memory(images, labels, class_names, mean, std):
    """A split that is in no file."""
    digest = content_digest([images], images.shape[1:], labels, class_names)
    return Prepared(images, labels, class_names, mean, std, digest)


def attack_parameters(**changes):
    values = {
        "views": 3,
        "targets": 2,
        "seed": 5,
        "rows_per_shard": 16,
        "embed_images": True,
        "compression": "none",
    }
    return Attack(**(values | changes))


def search_parameters(**changes):
    return SearchParameters(**({"name": "newton", "tolerance": 0.02, "max_gradients": 20} | changes))


def view_parameters(**changes):
    return Views(**({"padding": 1, "flip": True} | changes))


def dataset_parameters(**changes):
    values = {
        "name": "digits",
        "path": "data/raw",
        "image_size": None,
        "channels": None,
        "background": 255,
        "train_images": None,
        "skip_bad": False,
        "seed": 0,
        "test_fraction": 0.25,
        "validation_fraction": 0.25,
    }
    return Dataset(**(values | changes))


def hinton_parameters(**changes):
    return HintonTerm.Parameters(**({"temperature": 3.0, "start": 4.0, "end": 1.0} | changes))


def bss_parameters(**changes):
    values = {
        "temperature": 3.0,
        "start": 2.0,
        "zero_at": 0.75,
        "fraction": 0.25,
        "moves_statistics": True,
        "converged_only": True,
    }
    return BssTerm.Parameters(**(values | changes))


def searching(teacher, batch_size=64, **changes):
    """A search of a teacher on the CPU; `changes` of its parameters."""
    return search_of(teacher, search_parameters(**changes), batch_size, CPU)


class Sections(NamedTuple):
    """The sections of the parameters that decide what samples are."""

    views: Views
    search: SearchParameters
    attack: Attack


def make_shards(folder: Path, train, teacher, attack, views=None, **search):
    """Search, write and publish a sample dataset; returns its directory. `search` changes parameters of the search."""
    weights = folder / "teacher.safetensors"
    save_weights(teacher, weights)
    loaded = Loaded(load_weights(weights), file_digest(weights))
    params = Sections(views or view_parameters(), search_parameters(**search), attack)
    dataset = SampleDataset.of(train, params, loaded, Store(folder / "store"))
    for _ in dataset.make(searching(loaded.model, **search), dataset.missing()):
        pass
    dataset.publish(folder / "shards")
    return folder / "shards"


# Losses: oracles in float64 NumPy, and what students are tested with


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def softened(student, teacher, temperature):
    """Cross-entropy of softened outputs, of each sample."""
    target = np.exp(log_softmax(np.asarray(teacher, np.float64) / temperature))
    return -(target * log_softmax(np.asarray(student, np.float64) / temperature)).sum(1)


def cross_entropy(logits, labels):
    return -log_softmax(logits)[np.arange(len(labels)), np.asarray(labels)].mean()


def random_normal(seed, *shape, size=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (size * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def random_logits(seed, rows=16, classes=5, size=3.0):
    return size * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))


class Counting(nn.Module):
    """A student that remembers the logits of its passes."""

    def __init__(self, student):
        super().__init__()
        self.student = student
        self.passes = []

    def forward(self, images):
        logits = self.student(images)
        self.passes.append(logits.detach().double().numpy())
        return logits


def training_student(seed=0):
    return tiny_resnet(seed).train().requires_grad_(True)


def wide_teacher(seed=50):
    """A resnet8w4 for the images of `tiny_resnet`: twice as wide as the students."""
    architecture = Architecture("resnet8w4", 4, (1, 8, 8), (0.4,), (0.3,))
    return untrained(architecture, random_images(seed, 256), seed)


def loss_of(student, losses, batch, epoch=0, epochs=1, teacher=None, first_stage=False, cross_entropy=1.0):
    """The loss of a batch by a method; `student` is a classifier, or one in `Counting`."""
    network = student.student if isinstance(student, Counting) else student
    return Objective(network, losses, teacher, cross_entropy).loss(student, batch, Moment(first_stage, epoch, epochs))


def features_of(classifier, images):
    """What the parts of a ResNet give out, and its logits: the submodules called one after the other, no hooks."""
    network, features = classifier.network, {}
    with torch.no_grad():
        x = (images - classifier.mean) / classifier.std
        x = features["conv1"] = network.conv1(x)
        x = network.bn1(x).relu()
        for name in ("layer1", "layer2", "layer3"):
            x = features[name] = getattr(network, name)(x).clone()
        features["linear"] = network.linear(x.mean((2, 3)))
    return {name: value.double().numpy() for name, value in features.items()}


def random_batch(seed, rows=24):
    """A batch of which the student's and the teacher's classes often are the labels; and what `boundary` gave out."""
    generator = torch.Generator().manual_seed(seed)
    images = random_images(seed, rows)
    student = training_student()(images).detach()
    teacher = student + 0.8 * torch.randn(student.shape, generator=generator)
    labels = torch.where(torch.rand(rows, generator=generator) < 0.8, student.argmax(1), 0)
    usable = torch.rand(rows, generator=generator) < 0.9
    samples = random_images(seed + 1, rows)
    boundary_logits = 3 * torch.randn(student.shape, generator=generator)
    found = torch.rand(rows, generator=generator) < 0.8
    asked = []

    class Boundary:
        def samples_of(self, chosen):
            asked.append(chosen.tolist())
            return BoundarySamples(
                samples=samples[chosen], teacher_logits=boundary_logits[chosen], usable=found[chosen]
            )

    batch = BoundaryBatch(images=images, labels=labels, teacher_logits=teacher, usable=usable, boundary=Boundary())
    return batch, asked, boundary_logits.numpy(), found.numpy()


def convolved(layer, features):
    """A 1x1 convolution (C', C, 1, 1) with bias, as loops over channels."""
    weight, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
    result = np.zeros((len(features), len(weight), *features.shape[2:]))
    for to in range(len(weight)):
        result[:, to] = bias[to]
        for channel in range(features.shape[1]):
            result[:, to] += weight[to, channel, 0, 0] * features[:, channel]
    return result


def built(architecture, seed=0):
    """A classifier with seeded weights, in evaluation mode, whose batch norms are not at their defaults."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(architecture)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.5, 0.5)
                nn.init.uniform_(module.running_var, 0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval()


def images_for(architecture, rows=6, seed=0):
    return torch.rand(rows, *architecture.image_shape, generator=torch.Generator().manual_seed(seed))


class Trap:
    """Would run code if it were unpickled."""

    def __reduce__(self):
        return pytest.fail, ("the pickle was loaded",)
