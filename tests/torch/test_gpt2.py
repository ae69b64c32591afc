"""Routing, counted parameter by parameter, on models built from configurations on the meta device."""

import io
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from orthlin.errors import OptionError, ShapeError
from orthlin.torch import optim
from orthlin.torch.gpt2 import OptimizerFactory, Routing, param_groups, route
from orthlin.torch.views import MatrixView

D, HEADS, VOCABULARY, CONTEXT = 32, 4, 80, 16


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


def gpt2_model(transformers, **options):
    small = {"n_embd": D, "n_layer": 2, "n_head": HEADS, "n_positions": CONTEXT, "vocab_size": VOCABULARY}
    config = transformers.GPT2Config(**(small | {"bos_token_id": None, "eos_token_id": None} | options))
    with torch.device("meta"):
        return transformers.GPT2LMHeadModel(config)


def llama_model(transformers, **options):
    small = {"hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    tokens = {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None}
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(small | tokens | options)))


class Attention(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.n_head = heads


class Block(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(d, bias=False), Attention(d, heads), nn.LayerNorm(d)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(d, 4 * d), "c_proj": nn.Linear(4 * d, d)})


class NanoGPT(nn.Module):
    def __init__(self, d=D, vocabulary=VOCABULARY, context=CONTEXT, layers=2, tied=True):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocabulary, d),
                "wpe": nn.Embedding(context, d),
                "h": nn.ModuleList([Block(d, HEADS) for _ in range(layers)]),
                "ln_f": nn.LayerNorm(d),
            }
        )
        self.lm_head = nn.Linear(d, vocabulary, bias=False)
        if tied:
            self.transformer.wte.weight = self.lm_head.weight


class Custom(nn.Module):
    """Experts in a parameter of its own, which no rule can know."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 6, bias=False)
        self.experts = nn.Parameter(torch.zeros(3, 6, 4))


def by_name(routing):
    return {row.name: row for row in routing.rows}


def size(routing, algorithm, decay=True):
    return sum(r.parameter.numel() for r in routing.rows if (r.algorithm, r.decay) == (algorithm, decay))


def orthogonal(routing):
    return {row.name: row.view for row in routing.rows if row.algorithm == "orthogonal"}


def assert_partition(model, routing):
    """Every parameter of a model once in the rows, and every trained one once in the groups."""
    expected = sorted(map(id, model.parameters()))
    assert sorted(id(row.parameter) for row in routing.rows) == expected
    grouped = [id(p) for group in routing.groups() for _, p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


# GPT-2 -------------------------------------------------------------------------------------------


def test_gpt2_124m_counted(transformers):
    model = gpt2_model(
        transformers, n_embd=768, n_layer=12, n_head=12, n_positions=1024, vocab_size=50257, n_inner=None
    )
    routing = route(model)
    assert_partition(model, routing)
    assert sum(row.parameter.numel() for row in routing.rows) == 124_439_808
    assert size(routing, "orthogonal") == 84_934_656
    assert size(routing, "adamw") == (50257 + 1024) * 768
    assert size(routing, "adamw", decay=False) == 124_439_808 - 84_934_656 - (50257 + 1024) * 768
    assert len(orthogonal(routing)) == 48
    assert "124,439,808 numbers in 148 parameters: orthogonal: 84,934,656; adamw: 39,383,808" in str(routing)


def test_gpt2_parameter_by_parameter(transformers):
    model = gpt2_model(transformers, n_layer=1)
    block = "transformer.h.0."
    conv1d = MatrixView(transposed=True)
    assert orthogonal(route(model)) == {
        f"{block}attn.c_attn.weight": MatrixView(transposed=True, splits=3),
        f"{block}attn.c_proj.weight": conv1d,
        f"{block}mlp.c_fc.weight": conv1d,
        f"{block}mlp.c_proj.weight": conv1d,
    }
    rows = by_name(route(model))
    assert {name for name, row in rows.items() if row.algorithm == "adamw" and row.decay} == {
        "transformer.wte.weight",
        "transformer.wpe.weight",
    }
    assert all(row.parameter.ndim == 1 for row in rows.values() if not row.decay)
    assert all(model.get_parameter(name) is row.parameter for name, row in rows.items())


def test_the_tied_embedding_is_there_once_and_says_so(transformers):
    model = gpt2_model(transformers)
    row = by_name(route(model))["transformer.wte.weight"]
    assert row.parameter is model.lm_head.weight
    assert row.reason == "embedding, also lm_head.weight"
    assert "lm_head.weight" not in by_name(route(model))


def test_conv1d_matrices_are_out_by_in(transformers):
    rows = by_name(route(gpt2_model(transformers)))
    shapes = {name: row.view.shapes(row.parameter.shape) for name, row in rows.items() if row.view}
    assert shapes["transformer.h.0.mlp.c_fc.weight"] == [(1, 4 * D, D)]
    assert shapes["transformer.h.0.mlp.c_proj.weight"] == [(1, D, 4 * D)]
    assert shapes["transformer.h.0.attn.c_attn.weight"] == [(3, D, D)]


def test_fused_qkv_can_stay_whole(transformers):
    views = orthogonal(route(gpt2_model(transformers), split_qkv=False))
    assert set(views.values()) == {MatrixView(transposed=True)}


def test_gpt2_per_head(transformers):
    views = orthogonal(route(gpt2_model(transformers), per_head=True))
    assert views["transformer.h.1.attn.c_attn.weight"] == MatrixView(transposed=True, splits=3 * HEADS)
    assert views["transformer.h.1.attn.c_proj.weight"] == MatrixView(True, HEADS, "in")
    assert views["transformer.h.1.mlp.c_proj.weight"] == MatrixView(transposed=True)


def test_the_blocks_of_a_fused_weight_are_the_heads_the_model_computes(transformers):
    """Zeroing the value block of head 1 makes its part of the attention output zero, no other."""
    torch.manual_seed(0)
    model = gpt2_model(transformers, n_layer=1).to_empty(device="cpu")
    attention = model.transformer.h[0].attn.eval()
    with torch.no_grad():
        for p in attention.parameters():
            p.normal_()
        attention.c_attn.bias.zero_()
        attention.c_proj.weight.copy_(torch.eye(D))
        attention.c_proj.bias.zero_()
        [stack] = orthogonal(route(model, per_head=True))["transformer.h.0.attn.c_attn.weight"].view(
            attention.c_attn.weight
        )
        stack[2 * HEADS + 1].zero_()
        heads = attention(torch.randn(1, 5, D))[0].unflatten(-1, (HEADS, D // HEADS))
    assert [bool(head.any()) for head in heads.unbind(-2)] == [True, False, True, True]


def test_cross_attention_fuses_keys_and_values(transformers):
    views = orthogonal(route(gpt2_model(transformers, add_cross_attention=True), per_head=True))
    assert views["transformer.h.0.crossattention.c_attn.weight"] == MatrixView(True, 2 * HEADS)
    assert views["transformer.h.0.crossattention.q_attn.weight"] == MatrixView(True, HEADS)
    plain = orthogonal(route(gpt2_model(transformers, add_cross_attention=True)))
    assert plain["transformer.h.0.crossattention.c_attn.weight"] == MatrixView(True, 2)


def test_an_untied_head_is_adamw_with_its_own_row(transformers):
    model = gpt2_model(transformers, tie_word_embeddings=False)
    routing = route(model)
    assert_partition(model, routing)
    assert by_name(routing)["lm_head.weight"][2:] == ("adamw", None, True, "output head")


@pytest.mark.parametrize("vocabulary", [D, 3 * D, 4 * D], ids=["hidden", "fused", "mlp"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_hidden_width_that_is_the_vocabulary_by_chance_stays_a_matrix(transformers, vocabulary, tied):
    routing = route(gpt2_model(transformers, vocab_size=vocabulary, n_positions=D, tie_word_embeddings=tied))
    assert len(orthogonal(routing)) == 8
    assert size(routing, "orthogonal") == 2 * 12 * D**2


# LLaMA -------------------------------------------------------------------------------------------


def test_llama_counted(transformers):
    model = llama_model(transformers)
    routing = route(model)
    assert_partition(model, routing)
    kv = D // HEADS * 2
    assert size(routing, "orthogonal") == 2 * (2 * D * D + 2 * kv * D + 3 * 48 * D)
    assert size(routing, "adamw") == 2 * VOCABULARY * D
    assert size(routing, "adamw", decay=False) == 5 * D
    assert set(orthogonal(routing).values()) == {MatrixView()}
    assert by_name(routing)["lm_head.weight"].algorithm == "adamw"


def test_llama_per_head_knows_grouped_queries(transformers):
    views = orthogonal(route(llama_model(transformers), per_head=True))
    attention = "model.layers.0.self_attn."
    assert views[f"{attention}q_proj.weight"] == MatrixView(splits=HEADS)
    assert views[f"{attention}k_proj.weight"] == views[f"{attention}v_proj.weight"] == MatrixView(splits=2)
    assert views[f"{attention}o_proj.weight"] == MatrixView(splits=HEADS, split_axis="in")
    assert views["model.layers.0.mlp.down_proj.weight"] == MatrixView()


def test_a_tied_llama_has_one_embedding(transformers):
    model = llama_model(transformers, tie_word_embeddings=True)
    routing = route(model)
    assert_partition(model, routing)
    assert size(routing, "adamw") == VOCABULARY * D


def test_byte_level_llama_keys_as_wide_as_the_vocabulary_stay_matrices(transformers):
    assert len(orthogonal(route(llama_model(transformers, vocab_size=16)))) == 2 * 7


# modules of PyTorch alone ------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("vocabulary", "context"), [(80, 16), (D, 16), (80, D), (3 * D, 4 * D)])
def test_nanogpt_counted(tied, vocabulary, context):
    model = NanoGPT(vocabulary=vocabulary, context=context, tied=tied)
    routing = route(model)
    assert_partition(model, routing)
    assert size(routing, "orthogonal") == 2 * 12 * D**2
    assert size(routing, "adamw") == (vocabulary * (1 if tied else 2) + context) * D
    assert orthogonal(routing)["transformer.h.1.attn.c_attn.weight"] == MatrixView(splits=3)


def test_nanogpt_per_head():
    views = orthogonal(route(NanoGPT(), per_head=True))
    assert views["transformer.h.0.attn.c_attn.weight"] == MatrixView(splits=3 * HEADS)
    assert views["transformer.h.0.attn.c_proj.weight"] == MatrixView(splits=HEADS, split_axis="in")
    assert views["transformer.h.0.mlp.c_proj.weight"] == MatrixView()


def test_a_model_inside_another_is_routed_the_same(transformers):
    outer = nn.Module()
    outer.inner = gpt2_model(transformers, tie_word_embeddings=False)
    inside = [(row.name.removeprefix("inner."), *row[2:]) for row in route(outer).rows]
    assert inside == [(row.name, *row[2:]) for row in route(outer.inner).rows]


def test_extra_heads_in_a_list_are_adamw_and_their_hidden_layers_are_not():
    model = NanoGPT()
    model.extra = nn.ModuleList([nn.Sequential(nn.Linear(D, D), nn.Linear(D, VOCABULARY)) for _ in range(2)])
    rows = by_name(route(model))
    assert rows["extra.1.0.weight"].algorithm == "orthogonal"
    assert rows["extra.1.1.weight"][2:] == ("adamw", None, True, "vocabulary-sized axis")


def test_a_raw_head_with_a_vocabulary_sized_axis_is_adamw():
    model = nn.ModuleDict({"table": nn.Embedding(50, 8)})
    model.head = nn.Parameter(torch.zeros(8, 50))
    assert by_name(route(model))["head"].reason == "vocabulary-sized axis"


def test_convolutions_norms_and_scalars():
    model = nn.Module()
    model.patches, model.grouped = nn.Conv2d(3, 8, 4), nn.Conv1d(8, 8, 3, groups=2, bias=False)
    model.norm, model.scale = nn.LayerNorm((4, 6)), nn.Parameter(torch.zeros(()))
    routing = route(model)
    assert orthogonal(routing) == {"patches.weight": MatrixView(), "grouped.weight": MatrixView(splits=2)}
    assert {row.name for row in routing.rows if not row.decay} == {"patches.bias", "norm.weight", "norm.bias", "scale"}
    assert str(routing).splitlines()[1].split()[:2] == ["scale", "scalar"]


def test_lora_a_is_adamw_b_is_orthogonal_and_the_base_is_frozen():
    layer = nn.Linear(8, 12).requires_grad_(False)
    layer.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
    layer.lora_B = nn.ModuleDict({"default": nn.Linear(2, 12, bias=False)})
    model = nn.ModuleDict({"q_proj": layer})
    routing = route(model)
    assert {row.name: row.algorithm for row in routing.rows} == {
        "q_proj.weight": "frozen",
        "q_proj.bias": "frozen",
        "q_proj.lora_A.default.weight": "adamw",
        "q_proj.lora_B.default.weight": "orthogonal",
    }
    assert_partition(model, routing)


def test_loras_that_are_parameters_are_routed_too():
    layer = nn.Linear(8, 12, bias=False)
    layer.lora_A, layer.lora_B = nn.Parameter(torch.zeros(2, 8)), nn.Parameter(torch.zeros(12, 2))
    rows = by_name(route(layer))
    assert (rows["lora_A"].algorithm, rows["lora_B"].algorithm) == ("adamw", "orthogonal")
    layer.lora_B = nn.Parameter(torch.zeros(3, 12, 2))
    with pytest.raises(OptionError, match="lora_B"):
        route(layer)


def test_frozen_parameters_are_listed_and_left_out():
    model = NanoGPT()
    model.transformer.wpe.requires_grad_(False)
    routing = route(model, overrides={"*.wpe.weight": "adamw"})
    assert_partition(model, routing)
    assert by_name(routing)["transformer.wpe.weight"].algorithm == "frozen"
    assert f"frozen: {CONTEXT * D}" in str(routing)


# errors and overrides ----------------------------------------------------------------------------


def test_an_unexpected_parameter_is_an_error_that_names_it_and_the_remedy():
    with pytest.raises(OptionError, match=r"no rule for experts \(3, 6, 4\) of Custom; name them in overrides"):
        route(Custom())
    views = orthogonal(route(Custom(), overrides={"experts": MatrixView(batch_ndim=1)}))
    assert views == {"up.weight": MatrixView(), "experts": MatrixView(batch_ndim=1)}


@pytest.mark.parametrize("layer", [nn.LSTM(4, 4), nn.GRUCell(4, 4), nn.Bilinear(2, 3, 4)])
def test_layers_that_are_no_plain_linear_map_are_an_error(layer):
    with pytest.raises(OptionError, match="no rule for weight"):
        route(layer)


def test_a_flattened_weight_is_an_error():
    layer = nn.Linear(4, 4, bias=False)
    layer.weight = nn.Parameter(torch.zeros(16))
    with pytest.raises(OptionError, match=r"weight \(16,\) of Linear"):
        route(layer)


def test_a_parameter_that_two_modules_read_differently_is_an_error():
    model = nn.ModuleDict({"a": Attention(D, HEADS), "b": nn.Linear(D, 3 * D, bias=False)})
    model["b"].weight = model["a"].c_attn.weight
    with pytest.raises(OptionError, match=r"a.c_attn.weight = b.weight is claimed twice.*overrides"):
        route(model)
    assert by_name(route(model, overrides={"b.weight": MatrixView()}))["a.c_attn.weight"].view == MatrixView()


def test_a_module_that_is_used_twice_is_routed_once():
    block = Block(D, HEADS)
    model = nn.ModuleList([block, block])
    assert_partition(model, route(model))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_two_parameters_in_one_memory_are_an_error_unless_one_is_frozen(device):
    model = NanoGPT(tied=False).to(device)
    model.lm_head.weight = nn.Parameter(model.transformer.wte.weight.detach())
    with pytest.raises(OptionError, match=r"transformer.wte.weight and lm_head.weight share memory"):
        route(model)
    model.lm_head.requires_grad_(False)
    assert_partition(model, route(model))


def test_parameters_side_by_side_in_one_memory_are_separate():
    flat = torch.zeros(24)
    a, b = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)
    a.weight, b.weight = nn.Parameter(flat[:12].view(4, 3)), nn.Parameter(flat[12:].view(4, 3))
    assert len(route(nn.ModuleList([a, b])).rows) == 2


def test_overrides_by_name_go_before_those_by_pattern():
    model = NanoGPT()
    name = "transformer.h.0.mlp.c_fc.weight"
    rows = by_name(route(model, overrides={"*.c_fc.weight": "adamw", name: MatrixView(splits=2)}))
    assert rows[name][2:] == ("orthogonal", MatrixView(splits=2), True, f"override {name}")
    assert rows["transformer.h.1.mlp.c_fc.weight"][2:] == ("adamw", None, True, "override *.c_fc.weight")
    assert rows["transformer.h.1.mlp.c_proj.weight"].algorithm == "orthogonal"


def test_overrides_reach_a_tied_parameter_by_any_of_its_names():
    assert by_name(route(NanoGPT(), overrides={"lm_head.weight": MatrixView()}))["transformer.wte.weight"].view
    assert not by_name(route(NanoGPT(), overrides={"*.ln_f.*": "adamw"}))["transformer.ln_f.weight"].decay


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        ({"nothing.weight": "adamw"}, OptionError, "'nothing.weight' is the name of no parameter and matches none"),
        ({"nothing.*": "adamw"}, OptionError, "'nothing.*' is the name of no parameter"),
        ({"lm_head.weight": "muon"}, OptionError, "expected 'adamw' or a MatrixView for 'lm_head.weight', got 'muon'"),
        ({"*.c_fc.*": "adamw", "*.mlp.*": MatrixView()}, OptionError, "claimed twice"),
        ({"*.c_fc.weight": MatrixView(splits=3)}, ShapeError, r"transformer.h.0.mlp.c_fc.weight \(override"),
        (["lm_head.weight"], OptionError, "expected a mapping"),
    ],
)
def test_bad_overrides_are_an_error(overrides, error, words):
    with pytest.raises(error, match=words):
        route(NanoGPT(), overrides=overrides)


def test_heads_that_cannot_be_found_or_do_not_divide_are_an_error():
    model = NanoGPT()
    model.transformer.h[1].attn.n_head = 5
    with pytest.raises(ShapeError, match=r"transformer.h.1.attn.c_attn.weight.*15 equal blocks"):
        route(model, per_head=True)
    del model.transformer.h[1].attn.n_head
    with pytest.raises(OptionError, match=r"per_head: transformer.h.1.attn \(Attention\).*num_heads"):
        route(model, per_head=True)
    model.config = SimpleNamespace(n_head=HEADS)
    assert orthogonal(route(model, per_head=True))["transformer.h.1.attn.c_attn.weight"].splits == 3 * HEADS
    with pytest.raises(OptionError, match="per_head: found no module"):
        route(nn.Linear(3, 2), per_head=True)


def test_a_fused_weight_of_another_width_stays_whole_and_says_so():
    model = nn.ModuleDict({"qkv": nn.Linear(D, 2 * D, bias=False)})
    row = route(model).rows[0]
    assert (row.view, row.reason) == (MatrixView(), f"Linear, fused, whole: {2 * D} out is not 3 x {D} in")


def test_what_is_not_a_module_is_an_error():
    with pytest.raises(OptionError, match=r"model: expected a torch.nn.Module, got dict"):
        route({})


# tables and groups -------------------------------------------------------------------------------

TABLE = """
name                            shape    algorithm        matrices     reason
transformer.wte.weight          80 x 32  adamw                         embedding, also lm_head.weight
transformer.wpe.weight          16 x 32  adamw                         embedding
transformer.h.0.ln_1.weight     32       adamw, no decay               weight of LayerNorm
transformer.h.0.attn.c_attn.weight  96 x 32  orthogonal  3 x 32 x 32  Linear, 3 fused
transformer.h.0.attn.c_proj.weight  32 x 32  orthogonal  1 x 32 x 32  Linear
transformer.h.0.ln_2.weight     32       adamw, no decay               weight of LayerNorm
transformer.h.0.ln_2.bias       32       adamw, no decay               bias of LayerNorm
transformer.h.0.mlp.c_fc.weight   128 x 32  orthogonal  1 x 128 x 32  Linear
transformer.h.0.mlp.c_fc.bias   128      adamw, no decay               bias of Linear
transformer.h.0.mlp.c_proj.weight   32 x 128  orthogonal  1 x 32 x 128  Linear
transformer.h.0.mlp.c_proj.bias   32       adamw, no decay               bias of Linear
transformer.ln_f.weight         32       adamw, no decay               weight of LayerNorm
transformer.ln_f.bias           32       adamw, no decay               bias of LayerNorm
15,680 numbers in 13 parameters: orthogonal: 12,288; adamw: 3,072; adamw, no decay: 320; frozen: 0
"""


def test_the_table():
    lines = str(route(NanoGPT(layers=1))).splitlines()
    assert [" ".join(line.split()) for line in lines] == [" ".join(line.split()) for line in TABLE.split("\n")[1:-1]]
    starts = [lines[0].index(word) for word in lines[0].split()]
    assert all(line[start - 1] == " " for line in lines[1:-1] for start in starts[1:] if len(line) > start)


def test_unequal_blocks_are_shown_one_by_one():
    table = str(route(nn.Linear(5, 8, bias=False), overrides={"weight": MatrixView(splits=(6, 2))}))
    assert "1 x 6 x 5 + 1 x 2 x 5" in table


def test_groups_are_one_for_each_view_and_two_for_adamw():
    model = NanoGPT()
    groups = param_groups(model)
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    assert settings == [
        {"algorithm": "orthogonal", "view": MatrixView(splits=3).as_dict()},
        {"algorithm": "orthogonal", "view": MatrixView().as_dict()},
        {"algorithm": "adamw"},
        {"algorithm": "adamw", "weight_decay": 0.0},
    ]
    assert all(model.get_parameter(name) is p for group in groups for name, p in group["params"])


def test_groups_hold_plain_values_that_load_safely():
    file = io.BytesIO()
    torch.save([{**group, "params": 0} for group in param_groups(NanoGPT(), per_head=True)], file)
    file.seek(0)
    assert MatrixView(**torch.load(file, weights_only=True)[0]["view"]).splits == 3 * HEADS


def test_nothing_gives_an_empty_routing():
    routing = route(nn.ReLU())
    assert (routing, routing.groups()) == (Routing(()), [])
    assert str(routing).splitlines()[-1].startswith("0 numbers in 0 parameters")


IMPORT = """
import sys
import orthlin.torch.gpt2
from torch import nn
orthlin.torch.gpt2.route(nn.Linear(3, 2))
print("transformers" in sys.modules)
"""


def test_transformers_is_neither_needed_nor_loaded():
    run = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=False)
    assert (run.stdout, run.stderr) == ("False\n", "")


# the factory -------------------------------------------------------------------------------------


def test_the_factory_routes_and_passes_the_rest_on():
    optimizer = OptimizerFactory()(NanoGPT(), optimizer="LowRankMuon", per_head=True, lr=0.1, rank=2)
    assert type(optimizer) is optim.LowRankMuon
    assert [group["lr"] for group in optimizer.param_groups] == [0.1] * 5
    views = [group["view"]["splits"] for group in optimizer.param_groups if group["algorithm"] == "orthogonal"]
    assert views == [3 * HEADS, HEADS, 1]
    assert optimizer.param_groups[-1]["weight_decay"] == 0.0 < optimizer.param_groups[-2]["weight_decay"]


@pytest.mark.parametrize("name", sorted({*optim.__all__} - {"PAPER"}))
def test_the_factory_makes_every_optimizer(name):
    assert type(OptimizerFactory()(NanoGPT(), optimizer=name, lr=0.1)) is getattr(optim, name)


def test_the_factory_refuses_other_optimizers():
    with pytest.raises(OptionError, match="optimizer: expected one of 'LowRankMuon'"):
        OptimizerFactory()(NanoGPT(), optimizer="Adam", lr=0.1)
