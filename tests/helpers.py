"""Small networks and data that the tests share: everything follows from explicit seeds."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.attack import Search
from pipeline.attack_run import SampleDataset
from pipeline.config import Attack, Dataset, Distillation
from pipeline.data import Prepared, content_digest
from pipeline.models import Architecture, Classifier, build
from pipeline.provenance import ROOT
from pipeline.storage import Store, file_digest
from pipeline.weights import load_weights, save_weights

CPU = torch.device("cpu")


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
        "search": "newton",
        "views": 3,
        "targets": 2,
        "seed": 5,
        "tolerance": 0.02,
        "max_gradients": 20,
        "rows_per_shard": 16,
        "embed_images": True,
        "compression": "none",
    }
    return Attack(**(values | changes))


def dataset_parameters(**changes):
    values = {
        "name": "digits",
        "path": "data/raw",
        "image_size": None,
        "channels": None,
        "train_images": None,
        "skip_bad": False,
        "seed": 0,
        "test_fraction": 0.25,
        "validation_fraction": 0.25,
        "padding": 1,
        "flip": True,
    }
    return Dataset(**(values | changes))


def distillation_parameters(**changes):
    values = {
        "temperature": 3.0,
        "hinton_start": 4.0,
        "hinton_end": 1.0,
        "boundary_start": 2.0,
        "boundary_zero_at": 0.75,
        "boundary_fraction": 0.25,
        "boundary_moves_statistics": True,
    }
    return Distillation(**(values | changes))


def make_shards(folder: Path, train, teacher, attack):
    """Search, write and publish a sample dataset; returns its directory."""
    weights = folder / "teacher.safetensors"
    save_weights(teacher, weights)
    dataset = SampleDataset(train, dataset_parameters(), attack, file_digest(weights), Store(folder / "store"))
    search = Search(load_weights(weights), attack, dataset_parameters(), CPU, batch_size=64)
    for _ in dataset.make(search, dataset.missing()):
        pass
    dataset.publish(folder / "shards")
    return folder / "shards"
