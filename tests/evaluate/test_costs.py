"""What networks cost, against counts by hand."""

import math

import pytest
import torch
from torch import nn

from pipeline.evaluate.costs import costs_of
from pipeline.evaluate.latency import measure_latency
from pipeline.networks.classifier import Architecture, Classifier, build
from pipeline.networks.weights import save_weights
from tests.support.helpers import CPU


def classifier(network, shape, classes=5):
    ones = (1.0,) * shape[0]
    return Classifier(network, Architecture("by hand", classes, shape, ones, ones))


def costs(model, tmp_path):
    save_weights(model, tmp_path / "weights.safetensors")
    return costs_of(model, tmp_path / "weights.safetensors")


def test_convolutions_and_products_of_matrices_count(tmp_path):
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),  # 9 x 11 to 5 x 6
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, (3, 1), groups=4, bias=False),  # to 3 x 6
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    found = costs(classifier(network, (3, 9, 11)), tmp_path)
    assert found.multiply_adds == 8 * 5 * 6 * 3 * 9 + 16 * 3 * 6 * 2 * 3 + 16 * 5
    assert found.parameters == (8 * 27 + 8) + 2 * 8 + 16 * 2 * 3 + (16 * 5 + 5)
    assert found.bytes == len((tmp_path / "weights.safetensors").read_bytes())


class Attention(nn.Module):
    """Attention among the columns of an image, whose rows are their features."""

    def __init__(self, fused):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.classify = nn.Linear(8, 5)
        self.fused = fused

    def forward(self, images):
        x = images[:, 0].transpose(1, 2)
        if self.fused:
            x = nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]
        else:
            x = self.attention(x, x, x, need_weights=False)[0]
        return self.classify(x.mean(1))


@pytest.mark.parametrize(("fused", "projections"), [(True, 0), (False, 4)])
def test_attention_counts_as_products_of_matrices(tmp_path, fused, projections):
    length, width = 12, 8
    found = costs(classifier(Attention(fused), (1, width, length)), tmp_path)
    assert found.multiply_adds == projections * length * width**2 + 2 * length**2 * width + width * 5
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_published_network_has_its_published_costs(tmp_path):
    # torchvision's table: 11,689,512 parameters and 1.814 GFLOPS, by which it means multiply-adds.
    model = build(Architecture("torchvision.resnet18", 1000, (3, 224, 224), (0.5,) * 3, (0.25,) * 3))
    found = costs(model, tmp_path)
    assert found.parameters == 11_689_512
    assert round(found.multiply_adds / 1e9, 3) == 1.814


def test_latency_grows_with_the_network_and_the_batch(monkeypatch):
    monkeypatch.setattr("pipeline.evaluate.latency.MEASURED", 0.1)
    shape = (3, 16, 16)
    small, large = (build(Architecture(name, 4, shape, (0.5,) * 3, (0.25,) * 3)) for name in ("resnet8", "resnet56w4"))
    measured = measure_latency({"small": small, "large": large}, CPU)
    assert measured.threads == torch.get_num_threads()
    assert measured.image_shape == shape
    assert list(measured.networks) == ["small", "large"]
    assert measured.networks["small"].image < measured.networks["large"].image
    for each in measured.networks.values():
        assert 0 < each.image < each.batch < math.inf
