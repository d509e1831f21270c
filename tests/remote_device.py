# SPDX-License-Identifier: Apache-2.0
"""
A device other than the CPU, for machines that have none: it finds tensors that were left behind.

A tensor of `"remote"` holds one of the CPU, on which PyTorch's kernels run. As on an accelerator, the two do not mix, but for numbers
and indices; what PyTorch makes on the device, or moves to it, is remote. A process that imports this has the device until it ends.
The registration of a device in Python is private, checked on torch 2.13.
"""

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map


aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
# Their tensor may be remote and their indices not.
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class _Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


backend_registration._setup_privateuseone_for_python_backend("remote", backend_module=_Backend())
REMOTE = torch.device("remote:0")


class RemoteTensor(torch.Tensor):
    """A tensor that says that it is on the device, and holds one that is not."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        """Wrap a tensor of the CPU."""
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=REMOTE,
        )
        tensor.held = held
        return tensor

    def __repr__(self) -> str:
        """Show what is held."""
        return f"RemoteTensor({self.held!r})"

    # What PyTorch has for accelerators, and not for subclasses.

    def tolist(self):
        """Copy to Python."""
        return self.held.tolist()

    def data_ptr(self) -> int:
        """Tell where it is."""
        return self.held.data_ptr()

    def __deepcopy__(self, memo):
        """Copy, a parameter to a parameter."""
        copied = RemoteTensor(self.held.detach().clone())
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, requires_grad=self.requires_grad)
        return memo.setdefault(id(self), copied)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Run an operation with a remote tensor among its arguments."""
        return _run(func, args, kwargs or {})


class RemoteDevice(TorchDispatchMode):
    """While it is entered, operations can make tensors on the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run any operation."""
        return _run(func, args, kwargs or {})


def _held(value):
    return value.held if isinstance(value, RemoteTensor) else value


def _remote(value):
    return RemoteTensor(value) if isinstance(value, torch.Tensor) and not isinstance(value, RemoteTensor) else value


def _run(func, args, kwargs):
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    is_remote = any(isinstance(value, RemoteTensor) for value in tensors)
    if is_remote and func not in COPIES:
        must_match = [args[0], *args[2:3]] if func in INDEXING else tensors
        left = [tuple(value.shape) for value in must_match if not isinstance(value, RemoteTensor) and value.ndim > 0]
        if left:
            raise RuntimeError(f"Tensors of {func} must be on one device; those of shapes {left} are on the CPU.")
    device, held_kwargs = kwargs.get("device"), tree_map(_held, kwargs)
    goes_there = device is not None and torch.device(device) == REMOTE
    if goes_there:
        held_kwargs["device"] = torch.device("cpu")
    out = func(*tree_map(_held, args), **held_kwargs)
    to_remote = goes_there if device is not None else is_remote
    if func is aten.copy_.default:
        to_remote = isinstance(args[0], RemoteTensor)
    if to_remote:
        out = tree_map(_remote, out)
    if not is_remote or func is aten._to_copy.default:
        return out
    return return_and_correct_aliasing(func, args, kwargs, out)


# `torch.tensor(..., device=...)` and lists as indices pass by the mode.

_LIBRARY = torch.library.Library("aten", "IMPL")


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return RemoteTensor(torch.empty_strided(size, stride, dtype=dtype))


def _empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return RemoteTensor(torch.empty(size, dtype=dtype))


def _copy_from(source, target, non_blocking=False):
    _held(target).copy_(_held(source))
    return target


for _name, _kernel in (("empty_strided", _empty_strided), ("empty.memory_format", _empty), ("_copy_from", _copy_from)):
    _LIBRARY.impl(_name, _kernel, "PrivateUse1")


__all__ = ["REMOTE", "RemoteDevice", "RemoteTensor"]
