"""The blocks of a matrix: how the fused projections of the usual architectures split, and heads of attention."""

from math import prod
from typing import Any, NamedTuple

from torch import nn

from orthlin.errors import OptionError

# Names decide how a matrix that is known to be one splits, never whether it is one; sizes are the module's.
FUSED = {"c_attn", "qkv", "Wqkv", "qkv_proj", "to_qkv", "query_key_value", "queries_keys_values", "in_proj_weight"}
QUERY = {"q_proj", "q_attn", "wq", "q_proj_weight"}
KEY_VALUE = {"k_proj", "v_proj", "wk", "wv", "k_proj_weight", "v_proj_weight"}
OUTPUT = {"c_proj", "o_proj", "out_proj", "proj", "wo", "dense", "Wo"}
HEADS = ("num_heads", "n_head", "n_heads", "num_attention_heads")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_n_heads", "n_kv_head", "n_kv_heads", "kv_heads")
# Gate and up, one after the other: twice as wide as what the next map takes in.
GATED = {"gate_up_proj", "Wi", "input_linear", "fc1", "w12", "weights_in"}
# Attributes of the module, or products of them, that are the sizes of the parts; the first to add up counts.
BOTH = "n_groups*ssm_state_size"
PARTS: dict[str, list[tuple[str, ...]]] = {
    "in_proj": [("intermediate_size",) * 2, ("intermediate_size", "intermediate_size", BOTH, BOTH, "num_heads")],
    "x_proj": [("time_step_rank", "ssm_state_size", "ssm_state_size")],
    "in_proj_qkv": [("key_dim", "key_dim", "value_dim")],
    "kv_a_proj_with_mqa": [("kv_lora_rank", "qk_rope_head_dim")],
}
# Parts that alternate by head or group of rows, which no strides reach: no blocks but the heads'.
ALTERNATING = {"query_key_value", "queries_keys_values", "in_proj_qkvz", "in_proj_ba", "kv_b_proj"}
ALTERNATING_IN = {
    "CodeGenAttention",
    "DisentangledSelfAttention",
    "GPTBigCodeAttention",
    "GptOssExperts",
    "MiniMaxLightningAttention",
    "ZambaMambaMixer",
}


class Blocks(NamedTuple):
    """How a matrix splits, and that in words."""

    splits: int | tuple[int, ...] = 1
    words: str = ""
    axis: str = "out"
    interleave: bool = False


WHOLE = ", fused, whole: "
"""Words of the reason for a matrix that is known to be fused, and does not split."""
ALTERNATE = Blocks(words=f"{WHOLE}its parts alternate")


class Place(NamedTuple):
    """A matrix in its module: its name there, its widths, and what the next map there takes in."""

    path: str
    module: nn.Module
    attribute: str
    out: int
    inner: int
    following: int
    config: Any

    def alternates(self) -> bool:
        """Whether the parts of a fused matrix alternate."""
        return self.attribute in ALTERNATING or type(self.module).__name__ in ALTERNATING_IN


def is_attention(module: nn.Module) -> bool:
    """Whether a module has projections that attention has."""
    names = {name for name, _ in module.named_children()}
    return isinstance(module, nn.MultiheadAttention) or bool((FUSED | QUERY) & names)


def blocks(place: Place, split_qkv: bool, per_head: bool) -> Blocks:
    """The blocks of a matrix."""
    if place.attribute in FUSED:
        return _attention(place, split_qkv, per_head)
    if place.attribute == "kv_b_proj" and per_head:
        key, value = (_size(place.module, key) for key in ("qk_nope_head_dim", "v_head_dim"))
        queries, _ = _head_counts(place)
        return Blocks((key, value) * queries, f", {queries} x 2 heads") if key and value else ALTERNATE
    parts = _parts(place)
    if parts != Blocks():
        return parts
    if not per_head or not is_attention(place.module):
        return Blocks()
    queries, others = _head_counts(place)
    if place.attribute in OUTPUT:
        return Blocks(queries, f", {queries} heads in", "in")
    count = queries if place.attribute in QUERY else others if place.attribute in KEY_VALUE else 1
    return Blocks(count, f", {count} heads" if count > 1 else "")


def _attention(place: Place, split_qkv: bool, per_head: bool) -> Blocks:
    """The blocks of a fused query, key and value projection."""
    module, out, inner = place.module, place.out, place.inner
    fused = 2 if getattr(module, "is_cross_attention", False) else 3
    thirds = out == fused * inner
    queries, others = _head_counts(place, needed=thirds and per_head)
    if fused == 2 or (thirds and getattr(module, "head_dim", None) != out / (queries + 2 * others or 1)):
        others = queries
    count = (fused == 3) * queries + 2 * others
    if not thirds and (not queries or fused == 2 or out % count):
        return Blocks(words=f"{WHOLE}{out} out is not {fused} x {inner} in")
    if per_head:
        return Blocks(count, f", {fused} x {queries} heads" if others == queries else f", {count} heads")
    if not split_qkv:
        return Blocks()
    if fused == 3 and others != 1 and place.alternates():
        return ALTERNATE
    if others == queries:
        return Blocks(fused, f", {fused} fused")
    width = out // count
    return Blocks((queries * width, others * width, others * width), ", 3 fused")


def _parts(place: Place) -> Blocks:
    """The blocks of other fused projections."""
    module, attribute, out = place.module, place.attribute, place.out
    known = [[_size(module, key) for key in keys] for keys in PARTS.get(attribute, ())]
    sizes: list[int] | None = next((sizes for sizes in known if all(sizes) and sum(sizes) == out), None)
    if attribute == "in_proj" and out == 3 * place.inner and sizes is None:
        sizes = [place.inner] * 3
    if attribute in GATED and out == 2 * place.following:
        sizes = [out // 2] * 2
    if sizes is not None and attribute in GATED and getattr(module, "is_concatenated", True) is False:
        return Blocks(len(sizes), f", {len(sizes)} fused, row by row", interleave=True)
    if place.alternates() and (sizes is not None or attribute in ALTERNATING):
        return ALTERNATE
    if sizes is None:
        return Blocks(words=f"{WHOLE}no parts of {out}") if any(map(all, known)) else Blocks()
    return Blocks(len(sizes) if len(set(sizes)) == 1 else tuple(sizes), f", {len(sizes)} fused")


def _size(module: nn.Module, key: str) -> int:
    values = [getattr(module, name, 0) for name in key.split("*")]
    return prod(values) if all(isinstance(value, int) for value in values) else 0


def _head_counts(place: Place, needed: bool = True) -> tuple[int, int]:
    """Heads of the queries, and of the keys and values; zeros where nothing says them and they are not needed."""
    for source in (place.module, getattr(place.module, "config", None), place.config):
        queries = _first(source, HEADS)
        if queries:
            own = (source, getattr(place.module, "config", None))
            return queries, next(filter(None, (_first(holder, KEY_VALUE_HEADS) for holder in own)), queries)
    if not needed:
        return 0, 0
    raise OptionError(
        f"per_head: {place.path} ({type(place.module).__name__}) and its config have none of {', '.join(HEADS)}; "
        "leave it out and give views in overrides"
    )


def _first(source: Any, keys: tuple[str, ...]) -> int:
    return next((n for key in keys if isinstance(n := getattr(source, key, None), int)), 0)
