"""Parameters of which every process holds a part: where the parts lie, and what stands in for them in a step."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from orthlin.torch.views import MatrixView


def is_sharded(x: Any) -> bool:
    """Whether a tensor is a DTensor; its module is loaded where one is at hand, not before."""
    return _is_dtensor(*type(x).__mro__)


@cache
def _is_dtensor(*kinds: Any) -> bool:
    return any(kind.__name__ == "DTensor" for kind in kinds)


def takes_part(p: Tensor, copies: Any = None) -> bool:
    """Whether a parameter is in a step: with a gradient, or if others may have one of their parts or copies."""
    return p.grad is not None or ((is_sharded(p) or copies is not None) and p.requires_grad)


def whole(x: Tensor) -> Tensor:
    """Return a tensor with all of its entries, gathered where they are elsewhere."""
    return x.full_tensor() if is_sharded(x) else x


def local(x: Tensor) -> Tensor:
    """Return the part of a tensor that is here, in its memory."""
    return x.to_local() if is_sharded(x) else x


def made(p: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """Make a tensor of the shape of a parameter, part by part, which lies as the parameter does."""
    p = p.detach()
    if not is_sharded(p):
        return make(p)
    return _assembled(make(p.to_local()), p, p.placements, p.shape)


def placed(x: Tensor, like: Tensor) -> Tensor:
    """Return a tensor that every process has whole, or has a part of, as `like` lies."""
    if not is_sharded(like):
        return whole(x)
    if is_sharded(x) and (x.device_mesh, x.placements) == (like.device_mesh, like.placements):
        return x
    from torch.distributed.tensor import distribute_tensor

    # no process sends anything: all have the same
    placed: Tensor = distribute_tensor(whole(x), like.device_mesh, like.placements, src_data_rank=None)
    return placed


def _assembled(part: Tensor, like: Tensor, placements: Any, shape: Any) -> Tensor:
    """DTensor of contiguous parts on the mesh of another."""
    from torch.distributed.tensor import DTensor

    stride = torch.empty(tuple(shape), device="meta").stride()
    tensor: Tensor = DTensor.from_local(
        part, like.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
    return tensor


def anywhere(flags: Tensor, groups: list[Any]) -> Tensor:
    """Largest values on all processes of groups, in place."""
    for group in groups:
        distributed.all_reduce(flags, distributed.ReduceOp.MAX, group=group)
    return flags


def sides(mesh: Any) -> list[Any]:
    """Return the groups of a mesh."""
    return [mesh.get_group(i) for i in range(mesh.ndim)]


def somewhere(flag: bool, params: list[Tensor], copies: Any = None) -> bool:
    """Whether a flag is set on any process with a part of a parameter, or a copy: all of them wait for each other."""
    meshes = dict.fromkeys(p.device_mesh for p in params if is_sharded(p))
    places = [(sides(mesh), mesh.device_type) for mesh in meshes]
    if copies is not None and params:
        places.append(([copies], params[0].device))
    for groups, device in places:
        flag = bool(anywhere(torch.tensor([flag], dtype=torch.int32, device=device), groups))
    return flag


class Part(NamedTuple):
    """What is here of matrices of a shape: some columns of some rows, and the processes with the others.

    It is the same for all matrices of one shape that lie alike, on every process.  With `whole`, a direction is made of
    whole matrices.
    """

    shape: tuple[int, int]
    start: int
    stop: int
    over_rows: Any = None
    over_columns: Any = None
    over_copies: Any = None
    whole: bool = False

    @property
    def group(self) -> Any:
        """The processes with the other parts, of matrices that are cut along one side."""
        return self.over_columns if self.over_rows is None else self.over_rows

    @property
    def columns(self) -> tuple[int, slice]:
        """Number of columns of a whole matrix, and those of them that are here."""
        return self.shape[1], slice(self.start, self.stop)


def cut_sides(p: Tensor, view: MatrixView) -> dict[str, int] | None:
    """Dimensions of the mesh along which rows and columns are cut; None unless every part is of whole blocks.

    Those are matrices cut along an axis along which they do not split, kernels and stacks that are not cut.
    """
    from torch.distributed.tensor import Replicate, Shard

    found: dict[str, int] = {}
    out = view.batch_ndim + view.transposed
    for i, placement in enumerate(p.placements):
        if type(placement) is Replicate:
            continue
        side = "out" if getattr(placement, "dim", None) == out else "in"
        known = type(placement) is Shard and view.batch_ndim <= placement.dim < view.batch_ndim + 2
        narrow = side == "in" and p.ndim > view.batch_ndim + 2
        if not known or narrow or side in found or (view.splits != 1 and view.split_axis == side):
            return None
        found[side] = i
    return found


def parts_of(p: Tensor, view: MatrixView) -> list[Part] | None:
    """Where each stack of a parameter lies, None if it can only be stepped along whole."""
    sides = cut_sides(p, view)
    if sides is None:
        return None
    groups = {side: p.device_mesh.get_group(i) for side, i in sides.items()}
    found, i = [], sides.get("in")
    for _, m, n in view.shapes(tuple(p.shape)):
        start, stop = (0, n) if i is None else chunk(n, p.device_mesh.size(i), p.device_mesh.get_local_rank(i))
        found.append(Part((m, n), start, stop, groups.get("out"), groups.get("in")))
    return found


def chunk(n: int, count: int, i: int) -> tuple[int, int]:
    """Bounds of a part, as torch.chunk cuts."""
    size = -(-n // count)
    start = min(size * i, n)
    return start, min(start + size, n)


def right_factor(right: Tensor, p: Tensor, view: MatrixView) -> Tensor:
    """Return a right factor (b, r, n), the same on every process, with its columns cut as those of a parameter."""
    sides = cut_sides(p, view) if is_sharded(p) else None
    if not sides or "in" not in sides:
        return right
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placements = [Shard(2) if i == sides["in"] else Replicate() for i in range(p.device_mesh.ndim)]
    cut: Tensor = distribute_tensor(right, p.device_mesh, placements, src_data_rank=None)
    return cut


class Held(NamedTuple):
    """A plain tensor with a gradient, and its state, in place of a parameter: its part here, or a gathered copy."""

    tensor: Tensor
    state: dict[str, Any]
    taken: dict[str, Any]
    p: Tensor
    original: dict[str, Any]
    gathered: bool

    def store(self) -> None:
        """Write back what is a copy, and what a step has replaced."""
        if self.gathered:
            local(self.p).copy_(local(placed(self.tensor, self.p)))
        for key, value in self.state.items():
            old = self.original[key]
            if not is_sharded(old):
                self.original[key] = value
            elif self.gathered:
                new = placed(value, old)
                if new.shape == old.shape:
                    local(old).copy_(local(new))
                else:
                    self.original[key] = new
            elif value is not self.taken[key]:  # a warm start with another number of rows
                self.original[key] = _assembled(value, old, old.placements, (*value.shape[:-1], old.shape[-1]))


def gradient(p: Tensor) -> Tensor:
    """Return the gradient, zero if it is not here."""
    return made(p, torch.zeros_like) if p.grad is None else p.grad


def held(p: Tensor, state: dict[str, Any], *, gathered: bool) -> Held:
    """Stand-in for a parameter in a step."""
    get = whole if gathered else local
    tensor = get(p.detach())
    tensor.grad = get(gradient(p))
    taken = {key: get(x) if isinstance(x, Tensor) else x for key, x in state.items()}
    return Held(tensor, dict(taken), taken, p, state, gathered)
