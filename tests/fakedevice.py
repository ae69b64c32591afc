"""Tensors without values on a device that no machine has, and a record of the calls of torch that reach them.

The device is the one that torch reserves for other vendors.  A guard that guards nothing is all that its fake tensors
need, and unlike those of "cuda" it can be had on every build of torch, from Python, without a trace elsewhere: the name
stays "privateuseone", and torch finds no accelerator.  Fake tensors raise where a value is read (`.item()`, an index of
booleans, `nonzero`) and where devices are mixed; what else makes the host wait is in `WAITS`.
What they cannot see: which kernels a device lacks, and waits inside of a library call that is not listed.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("privateuseone:0")
WAITS = frozenset({
    "_linalg_check_errors", "_linalg_eigh", "_linalg_eigvals", "_linalg_svd", "_linalg_slogdet", "linalg_eig",
    "linalg_lstsq", "_local_scalar_dense", "bincount", "equal", "histc", "is_nonzero", "masked_select", "nonzero",
    "repeat_interleave", "unique_consecutive", "unique_dim", "_unique2",
})  # fmt: skip
"""Calls of torch that read a result of theirs on the host: factorizations that look whether they have failed, and
results whose shape depends on values."""
_VIEWS = frozenset({
    "_conj", "_neg_view", "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "diagonal", "empty",
    "empty_like", "empty_strided", "expand", "imag", "lift_fresh", "new_empty", "new_empty_strided", "permute", "real",
    "reshape", "resolve_conj", "resolve_neg", "select", "slice", "split", "split_with_sizes", "squeeze", "t",
    "transpose", "unbind", "unsqueeze", "view", "view_as_complex", "view_as_real",
})  # fmt: skip
_LARGE = 512  # rows and columns from which a matrix counts as traffic; what low rank makes of it is narrower
_WRITE_ONLY = frozenset({"copy_", "fill_", "zero_", "normal_", "uniform_"})


class _Guard(torch._C._acc.DeviceGuard):
    def type_(self):
        return torch._C._autograd.DeviceType.PrivateUse1


torch._C._acc.register_python_privateuseone_device_guard(_Guard())
if not hasattr(torch, DEVICE.type):
    yes, no = (lambda *_: True), (lambda *_: False)
    facts = {"is_initialized": yes, "is_available": no, "current_device": lambda: 0, "device_count": lambda: 1}
    amp = {"get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16]}
    torch._register_device_module(DEVICE.type, SimpleNamespace(**facts, **amp, _is_in_bad_fork=no, manual_seed_all=no))


class Generator(torch.Generator):
    """A generator of the host that says that it lives where it is wanted."""

    def __new__(cls, device="cpu"):
        generator = super().__new__(cls, "cpu")
        generator.where = torch.device(device)
        return generator

    @property
    def device(self):
        return self.where

    def manual_seed(self, seed):
        super().manual_seed(seed)
        return self


class Call(NamedTuple):
    """One call of the library: its name, what is wrong with it, the bytes of large matrices that it moves."""

    name: str
    fault: str | None
    traffic: int


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def _bytes(x: torch.Tensor) -> int:
    if x.ndim < 2 or min(x.shape[-2:]) < _LARGE:
        return 0
    size = x.element_size()
    for n, stride in zip(x.shape, x.stride(), strict=True):
        size *= n if stride else 1
    return size


class Recorder(TorchDispatchMode):
    """Calls made below it, without those that move no data."""

    def __init__(self):
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        given = _tensors((args, kwargs))
        on_host = bool(given) and all(x.device.type == "cpu" and x.ndim == 0 for x in given)
        if name == "_local_scalar_dense" and on_host:  # a number of the host, such as AdamW's step
            return 1.0
        out = func(*args, **kwargs)
        made = _tensors(out)
        if (
            func.namespace == "aten"
            and name not in _VIEWS
            and not (on_host and all(x.device.type == "cpu" for x in made))
        ):
            self.calls.append(Call(name, _fault(name, given, made), _traffic(func, args, kwargs, out)))
        return out

    @property
    def faults(self) -> set[str]:
        return {call.fault for call in self.calls if call.fault}

    def __len__(self) -> int:
        return len(self.calls)

    def passes(self, size: int) -> float:
        """Bytes of large matrices that all calls but AdamW's read and write, in units of `size`."""
        return sum(call.traffic for call in self.calls if "adamw" not in call.name) / size


def _fault(name: str, given: list[torch.Tensor], made: list[torch.Tensor]) -> str | None:
    if name in WAITS:
        return name
    devices = {x.device.type for x in (*given, *made) if x.ndim or x.device.type != "cpu" or not given}
    if name in ("_to_copy", "copy_"):
        devices = {x.device.type for x in (*given, *made)}
    return f"{name}: {' and '.join(sorted(devices))}" if devices - {DEVICE.type} else None


def _traffic(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Bytes of large matrices read and written: what is only written to is not read."""
    total = 0
    schema = func._schema
    for i, argument in enumerate(schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        only = written and (argument.is_out or schema.name.removeprefix("aten::") in _WRITE_ONLY)
        total += sum(map(_bytes, _tensors(value))) * (written + (not only))
    fresh = all(result.alias_info is None for result in schema.returns)
    return total + (sum(map(_bytes, _tensors(out))) if fresh else 0)


def record(prepare: Callable[[Callable[..., torch.Tensor]], Callable[[], Any]]) -> Recorder:
    """Record the calls of `prepare(empty)()`, not those of `prepare(empty)`."""
    recorder = Recorder()
    with mock.patch.object(torch, "Generator", Generator), FakeTensorMode():
        run = prepare(lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=DEVICE))
        with recorder:
            run()
    return recorder
