"""The pretended GPU itself: faults that were planted are caught, and what is right passes, counted."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.support.helpers import CPU, random_images, tiny_resnet, training_student
from tests.support.pretended_gpu import DEVICE, PretendedGpu


@pytest.fixture
def gpu():
    with PretendedGpu() as gpu:
        yield gpu


def there(*shape):
    return torch.arange(1.0, 1 + np.prod(shape)).view(shape).to(DEVICE)


PLANTED = {
    "a mask made on the CPU in torch.where": lambda: torch.where(torch.ones(3, dtype=torch.bool), there(3), 0),
    "a sum of two devices": lambda: there(3) + torch.ones(3),
    "the same in place": lambda: there(3).add_(torch.ones(3)),
    "tensors of two devices in a list": lambda: torch.cat([there(3), torch.ones(3)]),
    "weights on the CPU": lambda: nn.Linear(3, 2)(there(4, 3)),
    "labels on the CPU": lambda: F.cross_entropy(there(4, 3), torch.zeros(4, dtype=torch.int64)),
    "values on the CPU by an index": lambda: there(3).index_put_((torch.tensor([0, 1], device=DEVICE),), torch.ones(2)),
    "the same by brackets": lambda: there(3).__setitem__(torch.tensor([0, 1], device=DEVICE), torch.ones(2)),
    "an index on the device into a tensor of the CPU": lambda: torch.ones(3)[torch.tensor([0], device=DEVICE)],
    "one that gather takes": lambda: there(2, 3).gather(1, torch.tensor([[0], [1]])),
    "a constant that is made without a device": lambda: there(3) * torch.linspace(0, 1, 3),
}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("fault", PLANTED)
def test_tensors_of_two_devices_are_refused(fault):
    with pytest.raises(RuntimeError, match=r"Expected all tensors .* same device, .* cuda:0 and cpu"):
        PLANTED[fault]()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("convert", [lambda x: x.numpy(), np.asarray, lambda x: np.add(x, 1)])
def test_numpy_of_a_tensor_on_the_device_is_refused(convert):
    with pytest.raises(TypeError, match=r"can't convert cuda:0 device type tensor to numpy"):
        convert(there(3))
    assert convert(there(3).cpu()).sum() in (6, 9)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    "draw",
    [
        lambda generator: torch.rand(3, generator=generator, device=DEVICE),
        lambda generator: torch.randperm(3, generator=generator, device=DEVICE),
        lambda generator: there(3).normal_(generator=generator),
        lambda generator: there(3).multinomial(1, generator=generator),
    ],
)
def test_a_generator_of_the_cpu_is_refused(draw):
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
        draw(torch.Generator())


def test_what_cuda_takes_of_two_devices_passes(gpu):
    x = there(2, 3)
    x += torch.tensor(1.0)  # a number
    x[torch.tensor([0, 1])] = 5  # an index on the CPU
    x[0] = torch.ones(3)  # a copy
    torch.zeros(2, 3).copy_(x)
    assert x.cpu().tolist() == [[1, 1, 1], [5, 5, 5]]
    assert {what.split(" ", 1)[1] for what in gpu.waits} == {
        "copy to the device",
        "index that is on the CPU",
        "copy between devices",
        "copy from the device",
    }


HIDDEN_WAITS = {
    "a value": lambda x: x.sum().item(),
    "a branch": lambda x: 1 if x.any() else 0,
    "a comparison": lambda x: torch.equal(x, x),
    "a float": lambda x: float(x.max()),
    "a list": lambda x: x.tolist(),
    "in a message": lambda x: f"{x.max():.3g}",
    "rows of a mask": lambda x: x[x > 1],
    "places of a mask": lambda x: (x > 1).nonzero(),
    "values into a mask": lambda x: x.__setitem__(x > 1, x[:2].clone()),
    "repeats by a tensor": lambda x: x.repeat_interleave(x.long()),
    "a copy up": lambda x: torch.ones(3).to(x.device),
    "a copy up that is not pinned": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "a new tensor of a list": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "a copy down": lambda x: x.cpu(),
    "the same by `to`": lambda x: x.to("cpu"),
    "synchronize": lambda x: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("how", HIDDEN_WAITS)
def test_a_hidden_host_wait_is_counted_where_it_is(gpu, how):
    x = there(3)
    gpu.reset()
    HIDDEN_WAITS[how](x)
    assert gpu.waits
    assert all(place.startswith("test_pretended_gpu.py:") for place in gpu.waits)


NO_WAITS = {
    "arithmetic": (lambda x: (x * 2).sum(), 2),
    "a view": (lambda x: x.view(1, 3)[:, 1:].T.detach(), 0),
    "allocation": (lambda x: torch.empty(3, device=x.device), 0),
    "new tensors": (lambda x: (torch.zeros(3, device=x.device), torch.ones_like(x), x.new_zeros(3)), 3),
    "a number to the rows of a mask": (lambda x: x.__setitem__(x > 1, 0), 2),
    "rows of an index": (lambda x: x[x.argsort()], 2),
    "repeats": (lambda x: x.repeat_interleave(2), 1),
    "one hot": (lambda x: F.one_hot(x.long(), 5), 3),
    "on the CPU": (lambda x: torch.ones(3).sum().item(), 0),
    "where it is already": (lambda x: x.to(DEVICE).cuda(), 0),
}


@pytest.mark.parametrize("how", NO_WAITS)
def test_kernels_are_counted_and_nothing_waits(gpu, how):
    work, kernels = NO_WAITS[how]
    x = there(3)
    gpu.reset()
    work(x)
    assert gpu.counts() == (kernels, 0), (gpu.kernels, gpu.waits)


def test_a_network_on_the_device_learns_what_it_learns_on_the_cpu(gpu):
    images, labels = random_images(0, 8), torch.arange(8) % 4
    states = []
    for device in (CPU, DEVICE):
        student = training_student().to(device)
        assert {each.device.type for each in student.state_dict().values()} == {device.type}
        optimizer = torch.optim.SGD(student.parameters(), 0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(student(images.to(device)), labels.to(device)).backward()
            optimizer.step()
        states.append({name: value.cpu() for name, value in student.state_dict().items()})
    first = training_student().state_dict()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-5)
        assert "num_batches" in name or not torch.equal(first[name], value), name


@pytest.mark.usefixtures("gpu")
def test_copies_and_files_keep_values_and_device():
    model = tiny_resnet(0).to(DEVICE)
    content = io.BytesIO()
    torch.save(model.state_dict(), content)
    content.seek(0)
    loaded = torch.load(content, map_location=DEVICE, weights_only=True)
    for other in (copy.deepcopy(model).state_dict(), loaded):
        assert {value.device for value in other.values()} == {DEVICE}
        assert all(torch.equal(other[name], value) for name, value in model.state_dict().items())
    content.seek(0)
    on_cpu = torch.load(content, map_location="cpu", weights_only=True)
    assert {value.device for value in on_cpu.values()} == {CPU}


def test_a_division_by_a_number_rounds_as_on_cuda(gpu):
    values = torch.arange(256.0)
    by_number = (values.to(DEVICE) / 255).cpu()
    assert torch.equal(by_number, values * torch.tensor(1 / 255))
    assert not torch.equal(by_number, values / 255)
    assert torch.equal((values.to(DEVICE) / torch.full((), 255.0, device=DEVICE)).cpu(), values / 255)


def test_afterwards_all_is_as_it_was():
    before = torch.cuda.is_available(), torch.cuda.device_count(), torch.load
    with PretendedGpu():
        assert (torch.cuda.is_available(), torch.cuda.device_count()) == (True, 1)
    assert (torch.cuda.is_available(), torch.cuda.device_count(), torch.load) == before
    assert torch.ones(1).device == CPU
    assert PretendedGpu.current is None
