"""The rules of routing one by one, on modules of PyTorch alone: heads, routers, experts, blocks, tables, remarks."""

import warnings
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from orthlin.errors import OptionError
from orthlin.torch.gpt2 import param_groups, route
from orthlin.torch.views import MatrixView

D = 16


def algorithms(model, **options):
    """Who steps each parameter with axes."""
    return {row.name: row.algorithm for row in route(model, **options).rows if row.parameter.ndim > 1}


def adamw(model):
    return [name for name, algorithm in algorithms(model).items() if algorithm == "adamw"]


def row_of(model, name="", **options):
    rows = [row for row in route(model, **options).rows if name in row.name and row.parameter.ndim > 1]
    assert len(rows) == 1
    return rows[0]


class Holder(nn.Module):
    """A module with such children and parameters, of ones, and plain attributes."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(torch.ones(part)) if isinstance(part, torch.Size) else part)


def raw(*shape):
    return torch.Size(shape)


def linear(inner, out):
    return nn.Linear(inner, out, bias=False)


def mlp(*widths):
    layers = [layer for pair in pairwise(widths) for layer in (linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


# heads -------------------------------------------------------------------------------------------

LENET = [nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5), nn.Flatten(), linear(400, 120), linear(120, 84), linear(84, 10)]


@pytest.mark.parametrize(
    ("model", "heads"),
    [
        (mlp(784, 64, 64, 10), ["4.weight"]),
        (mlp(784, 10), []),
        (linear(D, 3), []),
        (mlp(784, 64, 784), []),
        (mlp(D, D, D), []),
        (nn.Sequential(*LENET), ["5.weight"]),
        (Holder(body=mlp(8, 32, 32), policy=linear(32, 9), value=linear(32, 10)), ["policy.weight", "value.weight"]),
        (Holder(body=mlp(8, 32, 32), heads=nn.ModuleDict({"a": linear(32, 9)})), ["heads.a.weight"]),
        (Holder(layers=nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, 64, batch_first=True), 2)), []),
        (Holder(one=nn.Conv2d(3, 8, 3), two=nn.ConvTranspose2d(8, 8, 2), out=nn.Conv2d(8, 21, 1)), ["out.weight"]),
    ],
)
def test_the_last_matrix_of_a_plain_model_is_its_head_if_no_layer_takes_in_the_result(model, heads):
    assert adamw(model) == heads


class Task(nn.Module):
    """What transformers' models say of themselves, and no more."""

    base_model_prefix = "body"

    def __init__(self, labels, **parts):
        super().__init__()
        self.config = SimpleNamespace(num_labels=labels)
        for name, part in parts.items():
            setattr(self, name, part)


@pytest.mark.parametrize("labels", [2, 3, D, 64])
def test_a_head_of_a_task_model_is_what_no_later_matrix_outside_of_the_base_takes_in(labels):
    layers = [linear(D, 64), linear(64, D)]
    assert adamw(Task(labels, body=nn.Sequential(*layers), dense=linear(D, D), head=linear(D, labels))) == [
        "head.weight"
    ]
    wrapped = Holder(module=Task(labels, body=nn.Sequential(*layers), head=linear(D, labels)))
    assert adamw(wrapped) == ["module.head.weight"]


def test_a_model_without_base_has_its_head_by_the_number_of_labels():
    model = Task(5, encoder=mlp(D, 64, D), score=linear(D, 5), projection=linear(D, 24))
    assert adamw(model) == ["score.weight"]
    assert adamw(Task(64, encoder=mlp(D, 64, D), projection=linear(D, 24))) == []
    listed = Task(5, encoder=nn.ModuleList([linear(D, 5)]), out=linear(D, D))
    assert adamw(listed) == []


def test_one_head_under_two_names_is_one():
    head = linear(D, 3)
    body = Holder(inner=linear(D, D), refine=head)
    assert adamw(Task(3, body=body, head=head)) == ["body.refine.weight"]


# experts and routers -----------------------------------------------------------------------------


def mixture(router, experts, **more):
    return Holder(gate=router, experts=experts, **more)


@pytest.mark.parametrize(
    "moe",
    [
        mixture(linear(D, 4), nn.ModuleList([mlp(D, 24, D) for _ in range(4)])),
        mixture(linear(D, 4), Holder(num_experts=4, up=raw(4, 24, D), down=raw(4, D, 24))),
        mixture(
            Holder(weight=raw(4, D), top_k=2, num_experts=4), Holder(w=raw(4, 24, D), v=raw(4, D, 24)), num_experts=4
        ),
        mixture(Holder(layer=linear(D, 4)), nn.ModuleDict({f"expert_{i}": mlp(D, 24, D) for i in range(4)})),
    ],
)
def test_a_router_is_adamw_and_experts_are_matrices(moe):
    moe.experts.num_experts = 4
    model = nn.ModuleList([Holder(attention=linear(D, 4), other=linear(D, D), moe=moe)])
    names = adamw(model)
    assert len(names) == 1
    assert ".gate" in names[0]
    assert [row.reason for row in route(model).rows if row.name in names] == ["router, onto experts"]
    shapes = [s for row in route(moe).rows if row.view for s in row.view.shapes(row.parameter.shape)]
    assert sum(count for count, m, n in shapes if {m, n} == {24, D}) == 8


@pytest.mark.parametrize("in_first", [False, True])
@pytest.mark.parametrize("says_so", [False, True])
def test_experts_are_read_as_they_are_stored(in_first, says_so):
    up, down = ((D, 48), (24, D)) if in_first else ((48, D), (D, 24))
    experts = Holder(num_experts=4, gate_up_proj=raw(4, *up), down_proj=raw(4, *down))
    if says_so:
        experts.is_transposed = in_first
    rows = {row.name: row.view for row in route(experts).rows}
    assert rows["gate_up_proj"] == MatrixView(transposed=in_first, batch_ndim=1, splits=2)
    assert rows["gate_up_proj"].shapes((4, *up)) == [(4, 24, D)] * 2
    assert rows["down_proj"].shapes((4, *down)) == [(4, D, 24)]


@pytest.mark.parametrize("concatenated", [False, True, None])
def test_gate_and_up_take_turns_where_their_module_says_so(concatenated):
    experts = Holder(num_experts=4, gate_up_proj=raw(4, 48, D), down_proj=raw(4, D, 24))
    if concatenated is not None:
        experts.is_concatenated = concatenated
    row = row_of(experts, "gate_up")
    assert row.view == MatrixView(batch_ndim=1, splits=2, interleave=concatenated is False)
    assert ("row by row" in row.reason) is (concatenated is False)


# blocks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "name", "splits", "words"),
    [
        (Holder(qkv_proj=linear(D, 32), n_head=4, n_kv_head=2), "qkv", (16, 8, 8), "Linear, 3 fused"),
        (Holder(qkv_proj=linear(D, 3 * D), n_head=4), "qkv", 3, "Linear, 3 fused"),
        (Holder(query_key_value=linear(D, 3 * D), n_head=4), "query", 1, "Linear, fused, whole: its parts alternate"),
        (Holder(query_key_value=linear(D, 25), n_head=4, n_kv_head=2), "query", 1, "Linear, fused, whole: 25 out"),
        (Holder(query_key_value=linear(D, 24), n_head=4, n_kv_head=1), "query", (16, 4, 4), "Linear, 3 fused, narrow"),
        (Holder(gate_up_proj=linear(D, 64), down_proj=linear(32, D)), "gate", 2, "Linear, 2 fused"),
        (Holder(fc1=linear(D, 2 * D), fc2=linear(2 * D, D)), "fc1", 1, "Linear"),
        (Holder(in_proj=linear(D, 64), intermediate_size=32), "in_proj", 2, "Linear, 2 fused"),
        (Holder(in_proj=linear(D, 64), intermediate_size=30), "in_proj", 1, "Linear, fused, whole: no parts of 64"),
        (nn.MultiheadAttention(D, 2), "in_proj_weight", 3, "MultiheadAttention, 3 fused"),
        (nn.Conv2d(8, 16, 3, groups=2), "weight", 2, "Conv2d"),
        (nn.ConvTranspose2d(16, 8, 3, groups=2), "weight", 2, "ConvTranspose2d"),
    ],
)
def test_a_fused_matrix_splits_by_what_its_module_says_or_says_why_not(model, name, splits, words):
    row = row_of(model, name)
    assert (row.algorithm, row.view) == ("orthogonal", MatrixView(splits=splits))
    assert row.reason.startswith(words)


def test_heads_that_alternate_split_per_head():
    model = Holder(query_key_value=linear(D, 32), dense=linear(D, D), n_head=4, n_kv_head=2)
    assert row_of(model, "query", per_head=True).view.splits == 8
    assert row_of(model, "dense", per_head=True).view == MatrixView(splits=4, split_axis="in")


def test_fused_attention_stays_whole_on_request():
    assert row_of(Holder(qkv_proj=linear(D, 3 * D)), "qkv", split_qkv=False).view == MatrixView()


# what is no matrix -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, D), (1, D), (D, 1), (1, 5, D), (1, 4, 4, D), (49, 4)])
def test_tokens_and_tables_are_adamw(shape):
    row = row_of(Holder(layer=linear(D, D), token=raw(*shape)), "token")
    assert (row.algorithm, row.decay) == ("adamw", sum(n > 1 for n in shape) > 1)
    assert ("taken for a table" in row.reason) == (shape == (49, 4))


def test_parameters_that_ask_for_no_decay_have_none():
    model = Holder(layer=linear(D, D), scale=raw(D, 4), A_log=raw(D, 4), bias_table=raw(D, 4))
    model.scale._no_weight_decay = True
    assert [row.decay for row in route(model).rows] == [False, False, False, True]


@pytest.mark.parametrize("layer", [nn.Conv1d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(D, 1)])
def test_vectors_are_adamw(layer):
    assert row_of(layer)[2:] == ("adamw", None, True, f"{type(layer).__name__}, vectors: an axis of 1")


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_a_parametrized_weight_is_adamw(norm):
    model = nn.Sequential(linear(D, D), norm(nn.Conv1d(D, D, 3)))
    assert algorithms(model)["0.weight"] == "orthogonal"
    assert len(adamw(model)) == len(algorithms(model)) - 1


def test_a_linear_map_of_another_class_is_one_by_its_widths():
    model = Holder(map=Holder(weight=raw(24, D), in_features=D, out_features=24))
    assert algorithms(model) == {"map.weight": "orthogonal"}


def test_a_patch_convolution_is_a_matrix_though_a_model_names_it_as_its_input():
    model = Holder(patches=nn.Conv2d(3, D, 4), block=linear(D, D))
    model.get_input_embeddings = lambda: model.patches
    assert adamw(model) == []


# lazy modules, remarks and the warning -----------------------------------------------------------


@pytest.mark.parametrize("layer", [nn.LazyLinear(4), nn.LazyConv2d(4, 3), nn.LazyBatchNorm1d()])
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_lazy_module_is_to_be_run_first(layer):
    with pytest.raises(OptionError, match=r"model: 1\.\w+ has no shape yet; run the model once first"):
        route(nn.Sequential(linear(D, D), layer))


def test_the_table_counts_what_is_narrow_whole_and_a_table():
    model = Holder(query_key_value=linear(D, 3 * D), n_head=2, low=linear(D, 7), wide=linear(8, D), positions=raw(9, D))
    lines = str(route(model)).splitlines()
    assert [line.split(":")[0] for line in lines[-3:]] == ["1 narrow", "1 fused, whole", "1 taken for tables"]
    assert str(route(linear(D, 8))).splitlines()[-1].startswith(f"{8 * D} numbers")


@pytest.mark.parametrize(
    ("model", "warned"),
    [(nn.LayerNorm(D), True), (nn.Embedding(9, D), True), (linear(D, D), False), (nn.ReLU(), False)],
)
def test_a_model_without_a_matrix_is_a_warning_and_a_line(model, warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        param_groups(model)
    assert [str(one.message) for one in caught] == [
        "model: no matrix is trained: AdamW steps all of it; print(route(model)) says why"
    ] * warned
    assert str(route(model)).endswith("no matrix is trained: AdamW steps all of it") is warned


def test_a_head_on_a_frozen_base_is_a_warning_and_no_error():
    model = Task(3, body=mlp(D, D).requires_grad_(False), head=linear(D, 3))
    with pytest.warns(UserWarning, match="no matrix is trained"):
        groups = param_groups(model)
    assert [group["algorithm"] for group in groups] == ["adamw"]
