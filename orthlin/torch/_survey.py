"""What the modules of a model say about each of its parameters: the rules behind the routing."""

import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any, NamedTuple

from torch import nn

from orthlin.errors import OptionError, ShapeError
from orthlin.torch.views import MatrixView

TABLES = (nn.Embedding, nn.EmbeddingBag)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
LISTS = (nn.ModuleList, nn.Sequential)
# Names decide how a matrix that is known to be one splits, never whether it is one.
FUSED = {"c_attn", "qkv", "Wqkv"}
QUERY = {"q_proj", "q_attn", "wq"}
KEY_VALUE = {"k_proj", "v_proj", "wk", "wv"}
OUTPUT = {"c_proj", "o_proj", "out_proj", "proj", "wo"}
HEADS = ("num_heads", "n_head", "n_heads", "num_attention_heads")
KEY_VALUE_HEADS = ("num_key_value_heads", "n_kv_head", "n_kv_heads")


class Claim(NamedTuple):
    """What one owner of a parameter says about it."""

    algorithm: str
    view: MatrixView | None
    decay: bool
    reason: str


class Survey:
    """Facts about a whole model that the claims on its parameters need."""

    def __init__(self, model: nn.Module, split_qkv: bool, per_head: bool) -> None:
        self.split_qkv, self.per_head = split_qkv, per_head
        self.config = getattr(model, "config", None)
        self.modules = dict(model.named_modules(remove_duplicate=False))
        inputs, outputs = _answers(model, "get_input_embeddings"), _answers(model, "get_output_embeddings")
        tables = [module for module in model.modules() if isinstance(module, TABLES)]
        self.embeddings = {p for module in (*inputs, *tables) for p in module.parameters()}
        self.heads = {p for module in outputs for p in module.parameters()}
        known = [module for module in inputs if isinstance(module, TABLES)] or tables
        self.vocabularies = {module.num_embeddings for module in known}
        widths = {name: _widths(module) for name, module in self.modules.items() if _plain_view(module)}
        self.taken_in = {width[1] for width in widths.values()}
        self.last = {self._entry(name): name for name in widths}
        self.attentions = {name for name, module in self.modules.items() if (FUSED | QUERY) & _children(module)}
        if per_head and not self.attentions:
            raise OptionError(
                f"per_head: found no module with one of {', '.join(sorted(FUSED | QUERY))}; "
                "leave it out and give views in overrides"
            )

    def owner(self, name: str) -> nn.Module:
        """Module that holds a parameter."""
        return self.modules[name.rpartition(".")[0]]

    def claim(self, name: str, p: nn.Parameter) -> Claim | None:
        """What the owner of a parameter says about it; None where no rule knows it."""
        home, _, attribute = name.rpartition(".")
        module = self.modules[home]
        view = _plain_view(module) if attribute == "weight" else None
        if not p.requires_grad:
            return Claim("frozen", None, False, "does not require a gradient")
        if view is not None and p.ndim < 2:
            return None  # flattened or emptied by a wrapper, no matrix any more
        if p.ndim < 2 or isinstance(module, NORMS):
            return Claim("adamw", None, False, f"{attribute} of {type(module).__name__}")
        if p in self.embeddings or p in self.heads:
            return Claim("adamw", None, True, "embedding" if p in self.embeddings else "output head")
        if self._has_vocabulary(home, tuple(p.shape) if view is None else _widths(module)):
            return Claim("adamw", None, True, "vocabulary-sized axis")
        if "lora_A" in name.split("."):
            return Claim("adamw", None, True, "LoRA A")
        if "lora_B" in name.split(".") and (view is not None or p.ndim == 2):
            return Claim("orthogonal", view or MatrixView(), True, "LoRA B")
        if view is None:
            return None
        split, how = self._attention(home, view)
        return Claim("orthogonal", split, True, f"{type(module).__name__}{how}")

    def _entry(self, name: str) -> str:
        """The entry of the outermost module list that holds a module; "" outside of lists."""
        parts = name.split(".")
        inside = (i for i in range(len(parts)) if isinstance(self.modules[".".join(parts[:i])], LISTS))
        return ".".join(parts[: next(inside, -1) + 1])

    def _has_vocabulary(self, home: str, shape: tuple[int, ...]) -> bool:
        """Whether an axis is the vocabulary, not a hidden width of the same size: see the notes of `route`."""
        axes = self.vocabularies.intersection(shape)
        entry = self._entry(home)
        is_last = self.last.get(entry) == home
        return bool(axes - self.taken_in and (is_last or not entry)) or bool(axes and is_last and not entry)

    def _attention(self, home: str, view: MatrixView) -> tuple[MatrixView, str]:
        """The view of a matrix with the blocks it has in attention, and those in words."""
        parent, _, attribute = home.rpartition(".")
        if parent not in self.attentions or parent == home or isinstance(self.modules[home], nn.modules.conv._ConvNd):
            return view, ""
        out, inner = _widths(self.modules[home])
        fused = 2 if getattr(self.modules[parent], "is_cross_attention", False) else 3
        is_fused = attribute in FUSED and out == fused * inner
        if attribute in FUSED and not is_fused:
            return view, f", whole: {out} out is not {fused} x {inner} in"
        if not self.per_head:
            split = fused if is_fused and self.split_qkv else 1
            return replace(view, splits=split), f", {split} fused" if split > 1 else ""
        queries, others = self._head_counts(parent)
        if is_fused:
            return replace(view, splits=fused * queries), f", {fused} x {queries} heads"
        if attribute in OUTPUT:
            return replace(view, splits=queries, split_axis="in"), f", {queries} heads in"
        count = queries if attribute in QUERY else others if attribute in KEY_VALUE else 1
        return replace(view, splits=count), f", {count} heads" if count > 1 else ""

    def _head_counts(self, parent: str) -> tuple[int, int]:
        """Heads of the queries, and of the keys and values."""
        module = self.modules[parent]
        sources = (module, getattr(module, "config", None), self.config)
        found = [
            next((n for source in sources for key in keys if isinstance(n := getattr(source, key, None), int)), None)
            for keys in (HEADS, KEY_VALUE_HEADS)
        ]
        if found[0] is None:
            raise OptionError(
                f"per_head: {parent} ({type(module).__name__}) and its config have none of {', '.join(HEADS)}; "
                "leave it out and give views in overrides"
            )
        return found[0], found[1] or found[0]


class Overrides:
    """Decisions of the caller, by full name or pattern."""

    def __init__(self, given: Mapping[str, str | MatrixView], names: list[str]) -> None:
        if not isinstance(given, Mapping):
            raise OptionError(f"overrides: expected a mapping of parameter names, got {type(given).__qualname__}")
        self.given = given
        for key, value in given.items():
            if value != "adamw" and not isinstance(value, MatrixView):
                raise OptionError(f"overrides: expected 'adamw' or a MatrixView for {key!r}, got {value!r}")
            if key not in names and not any(fnmatchcase(name, key) for name in names):
                raise OptionError(f"overrides: {key!r} is the name of no parameter and matches none")

    def of(self, names: list[str], p: nn.Parameter) -> list[Claim]:
        """Claims on a parameter known by some names; full names go before patterns."""
        exact = [key for key in self.given if key in names]
        keys = exact or [key for key in self.given if any(fnmatchcase(name, key) for name in names)]
        return [
            Claim("adamw", None, p.ndim > 1, f"override {key}")
            if isinstance(value := self.given[key], str)
            else Claim("orthogonal", value, True, f"override {key}")
            for key in keys
            if p.requires_grad
        ]


def settled(names: list[str], p: nn.Parameter, claims: list[Claim]) -> Claim:
    """The one claim on a parameter."""
    first = claims[0]
    for claim in claims:
        if claim[:3] != first[:3]:
            raise OptionError(
                f"model: {' = '.join(names)} is claimed twice, as {first.reason} and as {claim.reason}; "
                "name it in overrides"
            )
    if first.view is not None:
        try:
            first.view.shapes(tuple(p.shape))
        except ShapeError as error:
            raise ShapeError(f"{names[0]} ({first.reason}): {error}") from None
    return first._replace(reason=", also ".join([first.reason, *names[1:]]))


def check_memory(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Refuse parameters that are two objects in one memory: each would be stepped by half of the gradient."""
    spans = []
    for name, p in parameters:
        start = p.storage_offset()
        extent = 1 + sum((n - 1) * stride for n, stride in zip(p.shape, p.stride(), strict=True))
        if p.numel():
            spans.append((p.untyped_storage()._cdata, start, start + extent, name))
    for (storage, _, end, name), (other, start, _, second) in pairwise(sorted(spans, key=lambda span: span[:3])):
        if storage == other and start < end:
            raise OptionError(f"model: {name} and {second} share memory; tie them by making them one Parameter")


def _answers(model: nn.Module, question: str) -> list[nn.Module]:
    """The modules that parts of a model name when asked, as transformers' models can be."""
    found: list[Any] = []
    for module in model.modules():
        with suppress(AttributeError, NotImplementedError):
            found.append(getattr(module, question)())
    return [module for module in found if isinstance(module, nn.Module)]


def _plain_view(module: nn.Module) -> MatrixView | None:
    """View of the weight of a module that is a linear map, else None."""
    # A Conv1D can only be there if its library is loaded, which is not ours to load.
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    if conv1d is not None and isinstance(module, conv1d):
        return MatrixView(transposed=True)
    if isinstance(module, nn.modules.conv._ConvNd) and not module.transposed:
        return MatrixView(splits=module.groups)
    return MatrixView() if isinstance(module, nn.Linear) else None


def _widths(module: Any) -> tuple[int, int]:
    """Out and in width of a module that is a linear map."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.out_channels, module.in_channels
    return module.weight.shape[1], module.weight.shape[0]


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}
