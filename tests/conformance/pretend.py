"""A device that is not there: tensors that say they are on it, whose numbers the CPU computes.

So that where tensors go can be tested without a GPU. As on one, an operation refuses a tensor of the CPU beside those
of the device (but numbers, and the rows of an index), and a generator of the CPU draws nothing there.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class Backend(_DummyBackendModule):
    """What torch asks of a device once it is known, also on behalf of whoever comes after these tests."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("pretend", backend_module=Backend())
DEVICE = torch.device("pretend", 0)
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
INDEXES = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


class Pretended(torch.Tensor):
    """A tensor on the device; `numbers` is the one that the CPU works on."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=torch.device("cpu"),
            dispatch_device=True,
        )

    def __init__(self, numbers):
        self.numbers = numbers

    def __tensor_flatten__(self):
        return ["numbers"], None

    @staticmethod
    def __tensor_unflatten__(inner, _, size, stride):
        return Pretended(inner["numbers"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})


class Literals(TorchFunctionMode):
    """A tensor that is made of numbers, or becomes a list of them, goes past a dispatch mode."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == DEVICE.type:
            device = kwargs.pop("device")
            return torch.tensor(*args, **kwargs).to(device)
        if func is torch.Tensor.tolist and isinstance(args[0], Pretended):
            return args[0].numbers.tolist()
        made = func(*args, **kwargs)
        return made.to(args[0].device) if func is torch.Tensor.new_tensor else made


class Pretend(TorchDispatchMode):
    """Inside it, tensors can be made on the device and be moved to it."""

    def __enter__(self):
        self.literals = Literals()
        self.literals.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.literals.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})


def _compute(func, args, kwargs):
    if func is torch.ops.prim.device.default:
        return DEVICE
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    given = any(isinstance(tensor, Pretended) for tensor in tensors)
    target = kwargs.get("device")
    there = given if target is None else torch.device(target).type == DEVICE.type
    if given and func not in MOVES:
        for number, tensor in enumerate(tensors):
            index = func in INDEXES and number > 0 and tensor.dtype in (torch.int64, torch.bool)
            if not isinstance(tensor, Pretended) and tensor.dim() and not index:
                raise RuntimeError(f"{func}: a tensor {tuple(tensor.shape)} of the CPU beside one of {DEVICE}")
    if there and any(isinstance(leaf, torch.Generator) for leaf in leaves):
        raise RuntimeError(f"{func}: a generator of the CPU cannot draw on {DEVICE}")
    given_args, given_kwargs = tree_map(lambda x: x.numbers if isinstance(x, Pretended) else x, (args, dict(kwargs)))
    if target is not None:
        given_kwargs["device"] = torch.device("cpu")
    out = func(*given_args, **given_kwargs)
    if func is torch.ops.aten.copy_.default:
        return args[0]
    if not there:
        return out
    out = tree_map(lambda x: Pretended(x) if isinstance(x, torch.Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if given else out
