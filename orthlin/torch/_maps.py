"""The linear maps of a model: which parameters are one, how they are read, and which are heads and routers."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import takewhile
from typing import Any, NamedTuple

from torch import nn

from orthlin.torch.views import MatrixView

CONVOLUTIONS = nn.modules.conv._ConvNd
# Matrices by torch's own word, whose gates and forms no view knows: never to be taken for tables.
UNKNOWN = (nn.RNNBase, nn.RNNCellBase, nn.Bilinear)


class Map(NamedTuple):
    """A parameter that is one linear map or a stack of them, with its widths."""

    view: MatrixView
    out: int
    inner: int
    experts: int = 0


def maps_of(modules: dict[str, nn.Module], config: Any) -> dict[str, Map]:
    """Every linear map, by the full name of its parameter, in the order of the model."""
    found = {}
    for home, module in modules.items():
        for attribute, p in module.named_parameters(home, recurse=False):
            known = _map(module, attribute.rpartition(".")[2], p, config)
            if known is not None:
                found[attribute] = known
    return found


def _map(module: nn.Module, attribute: str, p: nn.Parameter, config: Any) -> Map | None:
    if isinstance(module, nn.MultiheadAttention):
        return Map(MatrixView(), *p.shape) if attribute.endswith("proj_weight") else None
    # A Conv1D can only be there if its library is loaded, which is not ours to load.
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", ())
    if attribute == "weight" and isinstance(module, conv1d):
        return Map(MatrixView(transposed=True), p.shape[-1], p.shape[0])
    if attribute == "weight" and isinstance(module, CONVOLUTIONS):
        return Map(MatrixView(splits=module.groups), module.out_channels, module.in_channels)
    widths: Any = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if attribute == "weight" and (isinstance(module, nn.Linear) or widths == tuple(p.shape)):
        return Map(MatrixView(), *widths)
    return _experts(module, p, config)


def _experts(module: nn.Module, p: nn.Parameter, config: Any) -> Map | None:
    """The stack of experts, or the choice among them, that a parameter is by the number of experts."""
    own = expert_counts(module)
    alone = sum(q.ndim > 1 for q in module.parameters(recurse=False)) == 1
    if p.ndim == 2 and alone and (chosen := own & {*p.shape}):
        out = chosen.pop()
        return Map(MatrixView(transposed=p.shape[0] != out), out, p.numel() // out)
    if p.ndim == 2 and (stacked := [n for n in own if p.shape[0] % n == 0 and n not in p.shape]):
        return Map(MatrixView(splits=stacked[0]), p.shape[0] // stacked[0], p.shape[1], stacked[0])
    if p.ndim != 3 or p.shape[0] not in own | expert_counts(getattr(module, "config", None)) | expert_counts(config):
        return None
    view = MatrixView(batch_ndim=1, transposed=_stores_in_first(module))
    out, inner = reversed(p.shape[1:]) if view.transposed else p.shape[1:]
    return Map(view, out, inner, p.shape[0])


def _stores_in_first(module: Any) -> bool:
    """Whether experts store in before out: the hidden width is what the first takes in and the last gives."""
    if isinstance(says := getattr(module, "is_transposed", None), bool):
        return says
    first, *_, last = [q.shape for q in module.parameters(recurse=False) if q.ndim == 3] * 2
    return bool(first[1] == last[2] and first[2] != last[1])


def expert_counts(source: Any) -> set[int]:
    """Numbers of experts that a module or configuration names, or has."""
    named = {key: value for key, value in vars(source).items() if "expert" in key} if source is not None else {}
    counts = {value for key, value in named.items() if type(value) is int and "tok" not in key}
    for name, child in source.named_children() if isinstance(source, nn.Module) else ():
        if "expert" in name:
            lists = isinstance(child, nn.ModuleList | nn.ModuleDict)
            counts |= {len(child)} if lists else {v for k, v in vars(child).items() if "experts" in k}
    return {n for n in counts if type(n) is int and n > 1}


def routers(modules: dict[str, nn.Module], maps: dict[str, Map]) -> set[str]:
    """Names of the maps onto experts: as wide as there are, and alone in their part of the mixture."""
    return {name for name, known in maps.items() if any(n == known.out for n in _choices(modules, maps, name))}


def _choices(modules: dict[str, nn.Module], maps: dict[str, Map], name: str) -> Iterator[int]:
    """Numbers of experts among which a map may choose: of its module, its mixture and what holds that."""
    part = name.rpartition(".")[0]
    for _ in range(3):
        if "expert" not in part.rpartition(".")[2] and sum(other.startswith(f"{part}.") for other in maps) == 1:
            yield from expert_counts(modules[part])
            yield from expert_counts(modules[part.rpartition(".")[0]])
        part = part.rpartition(".")[0]


def heads(modules: dict[str, nn.Module], maps: dict[str, Map]) -> dict[str, str]:
    """Names of the heads of models that say what their base is, or how many labels they have, with the reason."""
    found: dict[str, str] = {}
    models, plain = _models(modules), _without_lora(maps)
    taken_in = {known.inner for known in plain.values()}
    for name, model in models.items():
        inside = {key: known for key, known in plain.items() if _within(key, name)}
        base = f"{name}.{model.base_model_prefix}".strip(".")
        labels = getattr(getattr(model, "config", None), "num_labels", 0)
        if model.base_model_prefix and base in modules:
            last = _ends(_outside(inside, [base]), {labels, labels + 1})
        else:
            own = _outside(inside, [other for other in models if other != name and _within(other, name)])
            last = [key for key, known in own.items() if known.out == labels and labels not in taken_in]
            last = [key for key in last if not _in_list(modules, key)]
        found |= dict.fromkeys(last, f"head of {type(model).__name__}")
    return found


def last_maps(modules: dict[str, nn.Module], maps: dict[str, Map]) -> list[str]:
    """Names of the last map outside of such models, and of those beside it on the same input.

    There must be others before, and none of the model takes in what they give.
    """
    plain = _without_lora(maps)
    taken_in = {known.inner for known in plain.values()}
    loose = _outside(plain, list(_models(modules)))
    backwards = list(loose.items())[::-1]
    ends = [
        name
        for name, known in takewhile(
            lambda item: item[1].out not in taken_in and item[1].inner == backwards[0][1].inner, backwards
        )
    ]
    return ends if len(ends) < len(loose) else []


def _models(modules: dict[str, nn.Module]) -> dict[str, Any]:
    """The models of transformers, which say what their base is."""
    return {name: m for name, m in modules.items() if isinstance(getattr(m, "base_model_prefix", None), str)}


def _without_lora(maps: dict[str, Map]) -> dict[str, Map]:
    return {name: known for name, known in maps.items() if "lora_" not in name}


def _ends(maps: dict[str, Map], labels: set[int]) -> list[str]:
    """The maps whose result no later one takes in, flattened or stacked unless it is the labels."""
    listed = list(maps.items())
    later = [{known.inner for _, known in listed[i + 1 :]} for i in range(len(listed))]
    return [
        name
        for (name, known), widths in zip(listed, later, strict=True)
        if known.out not in widths and (known.out in labels or all(width % known.out for width in widths))
    ]


def _within(name: str, whole: str) -> bool:
    return not whole or name == whole or name.startswith(f"{whole}.")


def _outside(maps: dict[str, Map], wholes: list[str]) -> dict[str, Map]:
    return {name: known for name, known in maps.items() if not any(_within(name, whole) for whole in wholes)}


def _in_list(modules: dict[str, nn.Module], name: str) -> bool:
    parts = name.split(".")
    return any(isinstance(modules[".".join(parts[:i])], nn.ModuleList) for i in range(len(parts)))


def split(known: Map, splits: int | tuple[int, ...], axis: str, interleave: bool) -> MatrixView:
    """The view of a map with blocks."""
    return replace(known.view, splits=splits, split_axis=axis, interleave=interleave)
