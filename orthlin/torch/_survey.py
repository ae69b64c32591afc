"""What the modules of a model say about each of its parameters: the rules behind the routing."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from orthlin.errors import OptionError, ShapeError
from orthlin.torch._blocks import FUSED, QUERY, Place, blocks, is_attention
from orthlin.torch._maps import CONVOLUTIONS, UNKNOWN, Map, heads, last_maps, maps_of, routers, split
from orthlin.torch.views import MatrixView

TABLES = (nn.Embedding, nn.EmbeddingBag)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
LISTS = (nn.ModuleList, nn.Sequential)
LEAST = 8
"""A matrix with fewer rows or columns is said to be narrow: little is left there for an orthogonal step to do."""
NO_DECAY = ("bias", "A_log")
# Words of reasons that are counted under the table.
NARROW = f", narrow: an axis below {LEAST}"
RAW = ", of no layer: taken for a table"


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
        # Patches and spectra are dense: what maps them is no table, though models name it as their input too.
        lookups = [module for module in inputs if not any(map(_is_layer, module.modules()))]
        self.embeddings = {p for module in (*lookups, *tables) for p in module.parameters()}
        self.outputs = {p for module in outputs for p in module.parameters()}
        known = [module for module in inputs if isinstance(module, TABLES)] or tables
        self.vocabularies = {module.num_embeddings for module in known}
        self.maps = maps_of(self.modules, self.config)
        found = heads(self.modules, self.maps)
        self.heads = {self.owner(name).get_parameter(name.rpartition(".")[2]): how for name, how in found.items()}
        self.ends = dict.fromkeys(last_maps(self.modules, self.maps), "head, the last map")
        self.ends |= dict.fromkeys(routers(self.modules, self.maps), "router, onto experts")
        self.taken_in = {known.inner for known in self.maps.values()}
        self.last = {self._entry(name): name for name in self.maps}
        if per_head and not any(map(is_attention, model.modules())):
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
        module, known, kind = self.modules[home], self.maps.get(name), type(self.modules[home]).__name__
        if not p.requires_grad:
            return Claim("frozen", None, False, "does not require a gradient")
        if known is not None and p.ndim < 2:
            return None  # flattened or emptied by a wrapper, no matrix any more
        if p.ndim < 2 or isinstance(module, NORMS):
            return Claim("adamw", None, False, f"{attribute} of {kind}")
        if p in self.embeddings or p in self.outputs:
            return Claim("adamw", None, True, "embedding" if p in self.embeddings else "output head")
        if self._has_vocabulary(name, known, tuple(p.shape)):
            return Claim("adamw", None, True, "vocabulary-sized axis")
        if "lora_A" in name.split("."):
            return Claim("adamw", None, True, "LoRA A")
        if "lora_B" in name.split(".") and (known is not None or p.ndim == 2):
            return Claim("orthogonal", known.view if known else MatrixView(), True, "LoRA B")
        if p in self.heads or name in self.ends:
            return Claim("adamw", None, True, self.heads.get(p) or self.ends[name])
        if known is None:
            return self._table(module, attribute, p)
        view, how = self._blocks(name, known)
        widths = _block_widths(view, tuple(p.shape))
        if max(widths) == 1:
            return Claim("adamw", None, True, f"{kind}, vectors: an axis of 1")
        return Claim("orthogonal", view, True, f"{kind}{how}{NARROW if min(widths) < LEAST else ''}")

    def _table(self, module: nn.Module, attribute: str, p: nn.Parameter) -> Claim | None:
        """The claim on a parameter that is no linear map."""
        axes = sum(n != 1 for n in p.shape)
        is_form = isinstance(module, ParametrizationList) or (_is_layer(module) and attribute.startswith("weight_"))
        if isinstance(module, UNKNOWN) or (axes > 2 and p.shape[0] != 1 and not is_form):
            return None
        decay = (
            axes > 1 and not any(word in attribute for word in NO_DECAY) and not getattr(p, "_no_weight_decay", False)
        )
        raw = RAW if decay and p.ndim == axes and not is_form else ""
        return Claim("adamw", None, decay, f"{attribute} of {type(module).__name__}{raw}")

    def _entry(self, name: str) -> str:
        """The entry of the outermost module list that holds a parameter; "" outside of lists."""
        parts = name.split(".")[:-1]
        inside = (i for i in range(len(parts)) if isinstance(self.modules[".".join(parts[:i])], LISTS))
        return ".".join(parts[: next(inside, -1) + 1])

    def _has_vocabulary(self, name: str, known: Map | None, shape: tuple[int, ...]) -> bool:
        """Whether an axis is the vocabulary, not a hidden width of the same size: see the notes of `route`."""
        axes = self.vocabularies.intersection(shape if known is None else known[1:])
        entry = self._entry(name)
        is_last = self.last.get(entry) == name
        return bool(axes - self.taken_in and (is_last or not entry)) or bool(axes and is_last and not entry)

    def _blocks(self, name: str, known: Map) -> tuple[MatrixView, str]:
        """The view of a matrix with the blocks it has, and those in words."""
        home, _, attribute = name.rpartition(".")
        module = self.modules[home]
        if isinstance(module, CONVOLUTIONS):
            return known.view, ""
        if attribute == "weight" and home:
            home, _, attribute = home.rpartition(".")
        beside = [other for other in self.maps if _is_beside(other, home)]
        following = [self.maps[other].inner for other in beside[beside.index(name) + 1 :]]
        place = Place(home, self.modules[home], attribute, known.out, known.inner, [*following, 0][0], self.config)
        found = blocks(place, self.split_qkv, self.per_head)
        if known.experts:
            found = found._replace(words=f", {known.experts} experts{found.words}")
        if found.splits == 1:
            return known.view, found.words
        return split(known, found.splits, found.axis, found.interleave), found.words


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


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, CONVOLUTIONS))


def _is_beside(name: str, home: str) -> bool:
    """Whether a parameter is one of a module's own or of its children's."""
    prefix = f"{home}." if home else ""
    return name.startswith(prefix) and name.removeprefix(prefix).count(".") < 2


def _block_widths(view: MatrixView, shape: tuple[int, ...]) -> list[int]:
    """Smaller axis of the matrices; of none if the shape does not split, which is an error of its own."""
    with suppress(ShapeError):
        return [min(m, n) for _, m, n in view.shapes(shape)]
    return [LEAST]
