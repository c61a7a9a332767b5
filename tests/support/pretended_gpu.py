"""A GPU that is not there, for tests on machines without one.

Within `with PretendedGpu() as gpu:` torch finds a CUDA device. Its tensors say `cuda:0` and hold real values, which the
CPU computes. What a GPU refuses is refused, and what would run on it is counted:

    with PretendedGpu() as gpu:
        total = images.to("cuda").sum()   # one kernel; before it the host waits for the copy
        total.numpy()                     # TypeError: can't convert cuda:0 device type tensor to numpy...
    gpu.kernels, gpu.waits                # how often, by line of the code that asked for it

Refused: tensors of two devices in one operation, but for those pairs that CUDA takes (numbers, indexes, copies); numpy
arrays of a tensor on the device; random numbers on it from a generator of the CPU. A division by a number rounds as
CUDA's does.

A kernel is counted for each operator that is no view and not mere allocation, so a GPU runs at least so many. The host
waits for a value that it reads, for the number of rows that a mask selects, and for each copy from or to memory that is
not pinned.

Not pretended: how CUDA's kernels round otherwise, autocast, streams, graphs, several devices, running out of memory.

How: two layers. A `TorchFunctionMode` sees each call from Python, and answers those about devices. Tensors on the
device are a subclass whose `__torch_dispatch__` sees each operator, gradients' too. To C++ they are CPU tensors: its
autograd asks a driver about any others.
"""

import contextlib
import importlib
import os
import sys
from collections import Counter
from unittest import mock

import torch
import torch._dynamo  # the first optimizer imports it, and it looks at functions that are replaced here
from torch import Tensor
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("cuda", 0)
MEMORY = 80 << 30  # bytes
TORCH = os.path.dirname(torch.__file__)
INDEXING = ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_")
SIZED_BY_VALUES = ("nonzero", "masked_select", "_unique2", "repeat_interleave", "bincount")
MEMORY_ONLY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
VIEWS = ("detach", "_unsafe_view", "lift_fresh")  # beside those whose schemas say so
PRODUCT_OF = {
    torch.ops.aten.div.Tensor: torch.ops.aten.mul.Tensor,
    torch.ops.aten.div_.Tensor: torch.ops.aten.mul_.Tensor,
}
FACTORIES_THAT_COPY = ("tensor", "as_tensor", "asarray", "scalar_tensor")


class DeviceTensor(Tensor):
    """A tensor on the pretended device."""

    held: Tensor
    """Its values, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held, requires_grad=False):
        self = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=held.device,
            requires_grad=requires_grad,
        )
        self.held = held
        return self

    def __repr__(self):
        return f"DeviceTensor({self.held})"

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        assert PretendedGpu.current is not None, "a tensor of a pretended GPU outlived it"
        return PretendedGpu.current.run(operator, args, kwargs or {})


class PretendedGpu(TorchFunctionMode):
    """The device, while the block lasts, and what it was asked to do since the last `reset`."""

    current = None

    def __init__(self):
        super().__init__()
        self.reset()

    def reset(self):
        """Begin to count."""
        self.kernels = Counter()
        """Operators that launch at least one kernel, by 'module.py:line' of the caller."""
        self.waits = Counter()
        """Times that the host waited for the device, by 'module.py:line what'."""

    def counts(self):
        """Return (kernels, waits) so far."""
        return self.kernels.total(), self.waits.total()

    def __enter__(self):
        assert PretendedGpu.current is None, "there is one pretended GPU"
        self._patches = contextlib.ExitStack()
        optimizers = importlib.import_module("torch.optim.optimizer")
        for owner, name, value in (
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "device_count", lambda: 1),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "set_device", lambda device: None),
            (torch.cuda, "is_bf16_supported", lambda including_emulation=True: True),
            (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
            (torch.cuda, "get_device_name", lambda device=None: "pretended GPU"),
            (torch.cuda, "mem_get_info", lambda device=None: (MEMORY, MEMORY)),
            (torch.cuda, "synchronize", lambda device=None: self._wait("synchronize")),
            (torch.cuda, "empty_cache", lambda: None),
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "_lazy_call", lambda call, **options: None),
            (torch, "load", self._load(torch.load)),
            # A module that moves gets other parameters, as those on the device are of another type here.
            (torch, "_has_compatible_shallow_copy_type", lambda old, new: type(old) is type(new)),
            # SGD takes its steps in one kernel for all weights there, as on a GPU.
            (optimizers, "_foreach_supported_types", [Tensor, torch.nn.Parameter, DeviceTensor]),
        ):
            self._patches.enter_context(mock.patch.object(owner, name, value))
        PretendedGpu.current = self
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        PretendedGpu.current = None
        self._patches.close()

    # Calls from Python

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first = args[0] if args else None
        name = getattr(function, "__name__", "")
        if isinstance(first, Tensor):
            if function in GETTERS:
                return GETTERS[function](first)
            if function == Tensor.data.__set__ and _on_it(first):
                first.held = args[1].held
            elif name in METHODS:
                return METHODS[name](self, *args, **kwargs)
        if isinstance(first, DeviceTensor) and name in METHODS_OF_DEVICE:
            return METHODS_OF_DEVICE[name](self, *args, **kwargs)
        if "device" in kwargs:
            return self._make(function, args, kwargs)
        return function(*args, **kwargs)

    def _make(self, function, args, kwargs):
        """Make a new tensor where it is asked for, as `zeros(3, device=...)` and `ones_like(x, device=...)` do."""
        wanted, generator = kwargs["device"], kwargs.get("generator")
        if wanted is None:
            return function(*args, **kwargs)
        result = function(*args, **{**kwargs, "device": "cpu"})
        if not _is_device(wanted):
            return _map(_held, result)
        if generator is not None:
            _refuse_generator(generator)
        if function.__name__ in FACTORIES_THAT_COPY:
            self._wait("copy to the device")
        if not function.__name__.startswith("empty"):
            self._launch()
        return _map(_on_device, result)

    def _to(self, tensor, *args, copy=False, **kwargs):
        if args and isinstance(args[0], Tensor):
            args = (DEVICE if isinstance(args[0], DeviceTensor) else "cpu", args[0].dtype, *args[1:])
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and _is_device(device) != isinstance(tensor, DeviceTensor):
            tensor = self._upload(tensor, non_blocking) if _is_device(device) else self._download(tensor)
        if copy or dtype is not None or memory_format is not None:
            layout = {} if memory_format is None else {"memory_format": memory_format}
            return Tensor.to(tensor, dtype=tensor.dtype if dtype is None else dtype, copy=copy, **layout)
        return tensor

    def _upload(self, tensor, non_blocking=False):
        if isinstance(tensor, DeviceTensor):
            return tensor
        if tensor.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError("gradients through a copy to the pretended GPU")
        if not (non_blocking and tensor.is_pinned()):
            self._wait("copy to the device")
        return DeviceTensor(tensor.detach().clone(), tensor.requires_grad and tensor.is_leaf)

    def _download(self, tensor):
        if tensor.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError("gradients through a copy from the pretended GPU")
        self._wait("copy from the device")
        return tensor.held.detach().clone()

    def _refuse_numpy(self, tensor, *args, **kwargs):
        raise TypeError(
            f"can't convert {DEVICE} device type tensor to numpy. "
            "Use Tensor.cpu() to copy the tensor to host memory first."
        )

    def _list(self, tensor):
        return self._download(tensor.detach()).tolist()

    def _format(self, tensor, how):
        return format(self._download(tensor.detach()), how)

    def _pickle(self, tensor, protocol):
        return self._download(tensor.detach()).requires_grad_(tensor.requires_grad).__reduce_ex__(protocol)

    def _one_hot(self, tensor, num_classes):
        """As on CUDA, where no value is checked."""
        result = DeviceTensor(torch.zeros(*tensor.shape, num_classes, dtype=torch.int64))
        self._launch()
        return result.scatter_(-1, tensor[..., None], 1)

    def _load(self, load):
        """Return torch.load for files whose storages are to be on the device."""

        def load_there(*args, map_location=None, **kwargs):
            if not _is_device(map_location):
                return load(*args, map_location=map_location, **kwargs)
            loaded = load(*args, map_location="cpu", **kwargs)
            return _map(lambda each: self._upload(each) if isinstance(each, Tensor) else each, loaded)

        return load_there

    # Operators

    def run(self, operator, args, kwargs):
        """Run one operator of which at least one argument is on the device."""
        leaves = list(_leaves((args, kwargs)))
        for each in leaves:
            if isinstance(each, torch.Generator):
                _refuse_generator(each)
        name = operator._schema.name.removeprefix("aten::")
        strangers = [each for each in leaves if isinstance(each, Tensor) and not _on_it(each)]
        if any(each.ndim for each in strangers):
            if name == "copy_":
                self._wait("copy between devices")
            elif name in INDEXING and _only_indexes_are_strange(args):
                self._wait("index that is on the CPU")
            else:
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two devices, "
                    f"{DEVICE} and cpu! (when {operator} was called at {_asked_from()})"
                )
        self._count(operator, name, args)
        if operator in PRODUCT_OF and args[0].is_floating_point() and not _on_it(args[1]):
            operator, args = PRODUCT_OF[operator], (args[0], 1 / torch.as_tensor(args[1], dtype=args[0].dtype))
        result = operator(*_map(_held, args), **_map(_held, kwargs))
        if operator._schema.is_mutable and name.endswith("_"):
            return args[0] if operator._schema.returns else None
        given = {id(each.held): each for each in leaves if isinstance(each, DeviceTensor)}
        return _map(lambda each: given.get(id(each), _on_device(each)), result)

    def _count(self, operator, name, args):
        if operator.is_view or name in VIEWS or name in MEMORY_ONLY:
            return
        self._launch()
        masked = name in INDEXING and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if masked and not (name == "index" or args[2].ndim):
            masked = False  # one number to all of them: no row is counted
        if name == "repeat_interleave" and operator._overloadname != "Tensor":
            return
        if operator._schema.returns and not _gives_tensors(operator):
            self._wait("value that the host reads")
        elif masked or name in SIZED_BY_VALUES:
            self._wait("number of rows")

    def _launch(self):
        self.kernels[_asked_from()] += 1

    def _wait(self, what):
        self.waits[f"{_asked_from()} {what}"] += 1


GETTERS = {
    Tensor.device.__get__: lambda tensor: DEVICE if _on_it(tensor) else tensor.device,
    Tensor.is_cuda.__get__: lambda tensor: _on_it(tensor),
    Tensor.is_cpu.__get__: lambda tensor: not _on_it(tensor),
}
# By name: what has to be answered whatever the tensor is, and what only of one on the device.
METHODS = {
    "to": PretendedGpu._to,
    "type_as": PretendedGpu._to,
    "cuda": lambda gpu, tensor, device=None, non_blocking=False: gpu._upload(tensor, non_blocking),
}
METHODS_OF_DEVICE = {
    "cpu": lambda gpu, tensor: gpu._download(tensor),
    "numpy": PretendedGpu._refuse_numpy,
    "__array__": PretendedGpu._refuse_numpy,
    "tolist": PretendedGpu._list,
    "__format__": PretendedGpu._format,
    "__reduce_ex__": PretendedGpu._pickle,
    "get_device": lambda gpu, tensor: DEVICE.index,
    "one_hot": PretendedGpu._one_hot,
}


def _map(function, value):
    """Apply a function to each leaf of nested lists, tuples and dicts."""
    if isinstance(value, (list, tuple)):
        return type(value)([_map(function, each) for each in value])
    if isinstance(value, dict):
        return type(value)((key, _map(function, each)) for key, each in value.items())
    return function(value)


def _leaves(value):
    if isinstance(value, (list, tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _leaves(each)
    else:
        yield value


def _on_it(value):
    return isinstance(value, DeviceTensor)


def _held(value):
    return value.held if isinstance(value, DeviceTensor) else value


def _on_device(value):
    return DeviceTensor(value) if isinstance(value, Tensor) and not isinstance(value, DeviceTensor) else value


def _is_device(device):
    if device is None or callable(device) or isinstance(device, dict):
        return False
    return torch.device(device).type == DEVICE.type


def _refuse_generator(generator):
    raise RuntimeError(f"Expected a '{DEVICE.type}' device type for generator but found '{generator.device.type}'")


def _only_indexes_are_strange(args):
    tensor, _, *values = args
    return _on_it(tensor) and not any(isinstance(each, Tensor) and each.ndim and not _on_it(each) for each in values)


def _gives_tensors(operator):
    return all("Tensor" in str(each.type) for each in operator._schema.returns)


def _asked_from():
    """Return 'module.py:line' of the code outside torch and this module that is at work."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__ and not file.startswith((TORCH, "<")):
            return f"{os.path.basename(file)}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
