"""What a run is: the settings that decide its numbers."""

import ast
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, NamedTuple

from orthlin.errors import OptionError

OPTIMIZERS = ("adamw", "torch_muon", "msgd", "lowrank_msgd", "muon", "lowrank_muon")
MODELS = ("gpt2", "llama")
LABELS = {"text": "SHA-256 of the text"}


class Size(NamedTuple):
    """Layers, heads, width, and the context and batch that go with them."""

    layers: int
    heads: int
    width: int
    context: int
    batch: int


SIZES = {
    "pico": Size(2, 2, 32, 16, 4),
    "nano": Size(4, 4, 128, 64, 12),
    "nano_wide": Size(4, 4, 256, 64, 12),
    "nano_deep": Size(12, 4, 64, 64, 12),
    "micro": Size(6, 6, 384, 256, 64),
    "124m": Size(12, 12, 768, 1024, 8),
    "350m": Size(24, 16, 1024, 1024, 8),
    "774m": Size(36, 20, 1280, 1024, 4),
    "1.5b": Size(48, 25, 1600, 1024, 4),
}


class Spec(NamedTuple):
    """An optimizer's name and options, as in ``lowrank_muon:rank=32,warm_start=False``."""

    name: str
    options: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str) -> "Spec":
        """Read ``name`` or ``name:option=value,...``; values are Python literals or bare words."""
        name, _, rest = text.strip().partition(":")
        if name not in OPTIMIZERS:
            raise OptionError(f"optimizer {name!r} is unknown; accepted are {', '.join(OPTIMIZERS)}")
        try:
            call = ast.parse(f"f({rest})", mode="eval").body
            keys = [k.arg for k in call.keywords] if isinstance(call, ast.Call) else []
            if not isinstance(call, ast.Call) or call.args or None in keys or len({*keys}) < len(keys):
                raise ValueError("options are written option=value, each once, with commas between")
            options = {str(k.arg): _literal(k.value) for k in call.keywords}
        except (SyntaxError, ValueError) as problem:
            reason = "not Python literals" if isinstance(problem, SyntaxError) else problem
            raise OptionError(f"optimizer {text!r}: {reason}") from None
        return cls(name, options)

    def __str__(self) -> str:
        """Return the specification with its options in order, the same for every way to write it."""
        options = ",".join(f"{key}={self.options[key]!r}" for key in sorted(self.options))
        return f"{self.name}:{options}" if options else self.name


def _literal(node: ast.expr) -> Any:
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


@dataclass(frozen=True)
class Config:
    """The settings that decide a run's numbers; two runs with equal ones are the same run."""

    text: str
    vocabulary: str
    model: str
    size: str
    context: int
    batch: int
    steps: int
    warmup: int
    final_lr: float
    lr: float
    weight_decay: float
    clip: float
    optimizer: str
    split_qkv: bool
    per_head: bool
    seed: int
    eval_every: int
    eval_batches: int
    dtype: str
    amp: bool
    device: str
    compile: str | None = None
    capture: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain Python values."""
        return asdict(self)


LATER = {field.name: field.default for field in fields(Config) if field.default is not MISSING}
"""Settings that older files do not name."""


def differences(found: Any, wanted: Mapping[str, Any]) -> list[str]:
    """Say in words where two sets of settings differ."""
    if not isinstance(found, Mapping):
        return ["no settings are recorded in it"]
    found = LATER | dict(found)
    return [
        f"{LABELS.get(key, key)} is {_short(found.get(key))} there and {_short(wanted.get(key))} here"
        for key in dict.fromkeys([*wanted, *found])
        if found.get(key) != wanted.get(key)
    ]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
