"""Routing of tiny models of transformers: every matrix and every AdamW parameter, counted from the configuration."""

import os
from collections import Counter

import pytest
import torch

from orthlin.torch.gpt2 import route

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

D, F, LAYERS, HEADS, HEAD, KEYS, EXPERTS, LABELS = 32, 48, 2, 4, 8, 16, 4, 3
VOCABULARY = 90
TEXT = {"vocab_size": VOCABULARY, "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
BERT = {**TEXT, "intermediate_size": F, "max_position_embeddings": 40}
VIT = {**BERT, "image_size": 16, "patch_size": 4, "num_labels": LABELS}
PATCH = (D, 3 * 4 * 4)
NO_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
LLAMA = {**TEXT, **NO_TOKENS, "intermediate_size": F, "num_key_value_heads": KEYS // HEAD}
MIXTURE = {**LLAMA, "num_experts_per_tok": 2, "head_dim": HEAD}
GPT2 = {"n_embd": D, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 16, "vocab_size": VOCABULARY}
SIDES = ("encoder", "decoder")
BART = {"d_model": D, "vocab_size": VOCABULARY, "max_position_embeddings": 16}
for side in SIDES:
    BART |= {f"{side}_layers": LAYERS, f"{side}_attention_heads": HEADS, f"{side}_ffn_dim": F}
T5 = {"d_model": D, "d_kv": HEAD, "d_ff": F, "num_layers": LAYERS, "num_heads": HEADS, "vocab_size": VOCABULARY}
WAV2VEC = {**BERT, "conv_dim": [16, 16], "conv_kernel": [4, 4], "conv_stride": [2, 2], "num_feat_extract_layers": 2}
WAV2VEC |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}
DEEPSEEK = {"num_key_value_heads": HEADS, "n_routed_experts": EXPERTS, "moe_intermediate_size": 16, "n_group": 2}
DEEPSEEK |= {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK |= {"topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
QWEN_MOE = {"num_experts": EXPERTS, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}
BLOOM = {"vocab_size": VOCABULARY, "hidden_size": D, "n_layer": LAYERS, "n_head": HEADS}
MPT = {"vocab_size": VOCABULARY, "d_model": D, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": 16}
MODERNBERT = {**TEXT, **NO_TOKENS, "pad_token_id": 0, "intermediate_size": F}
FALCON = {**TEXT, "num_kv_heads": KEYS // HEAD}


def layers(*parts, count=LAYERS):
    """So many layers with these matrices each, as counts of shapes."""
    total = Counter()
    for part in parts:
        total.update(part)
    return Counter({shape: count * n for shape, n in total.items()})


def gated(width, count=1):
    return {(width, D): 2 * count, (D, width): count}


ALL_HEADS = {(D, D): 4}  # query, key, value, output
GROUPED = {(D, D): 2, (KEYS, D): 2}
ONE_KEY = {(D, D): 2, (HEAD, D): 2}
WHOLE = {(3 * D, D): 1, (D, D): 1}  # by head: stays in one piece
FFN, WIDE = {(F, D): 1, (D, F): 1}, {(4 * D, D): 1, (D, 4 * D): 1}
SEQ2SEQ = layers(ALL_HEADS, FFN) + layers(ALL_HEADS, ALL_HEADS, FFN)
KERNEL = 3

# model, configuration, its options, matrices, AdamW's parameters with axes; the others have one axis
CASES = [
    ("GPT2ForSequenceClassification", "GPT2Config", {**GPT2, "num_labels": LABELS}, layers(ALL_HEADS, WIDE), "ee h"),
    ("GPT2ForTokenClassification", "GPT2Config", {**GPT2, "num_labels": LABELS}, layers(ALL_HEADS, WIDE), "ee h"),
    ("GPT2ForQuestionAnswering", "GPT2Config", GPT2, layers(ALL_HEADS, WIDE), "ee h"),
    ("GPT2DoubleHeadsModel", "GPT2Config", GPT2, layers(ALL_HEADS, WIDE), "ee h"),
    ("LlamaForSequenceClassification", "LlamaConfig", {**LLAMA, "num_labels": 1}, layers(GROUPED, gated(F)), "e h"),
    ("LlamaForQuestionAnswering", "LlamaConfig", LLAMA, layers(GROUPED, gated(F)), "e h"),
    ("MistralForTokenClassification", "MistralConfig", LLAMA, layers(GROUPED, gated(F)), "e h"),
    ("BertForSequenceClassification", "BertConfig", BERT, layers(ALL_HEADS, FFN) + Counter({(D, D): 1}), "eee h"),
    ("BertForMultipleChoice", "BertConfig", BERT, layers(ALL_HEADS, FFN) + Counter({(D, D): 1}), "eee h"),
    ("BertForPreTraining", "BertConfig", BERT, layers(ALL_HEADS, FFN) + Counter({(D, D): 2}), "eee h"),
    ("RobertaForSequenceClassification", "RobertaConfig", BERT, layers(ALL_HEADS, FFN) + Counter({(D, D): 1}), "eee h"),
    ("RobertaForTokenClassification", "RobertaConfig", BERT, layers(ALL_HEADS, FFN), "eee h"),
    (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"dim": D, "hidden_dim": F, "n_layers": LAYERS, "n_heads": HEADS, "vocab_size": VOCABULARY},
        layers(ALL_HEADS, FFN) + Counter({(D, D): 1}),
        "ee h",
    ),
    (
        "ElectraForPreTraining",
        "ElectraConfig",
        {**BERT, "embedding_size": 16},
        layers(ALL_HEADS, FFN) + Counter({(D, 16): 1, (D, D): 1}),
        "eee h",
    ),
    (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {**BERT, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["c2p", "p2c"]},
        layers(ALL_HEADS, {(D, D): 2}, FFN) + Counter({(D, D): 1}),
        "eee h",
    ),
    (
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        MODERNBERT,
        layers(ALL_HEADS, gated(F)) + Counter({(D, D): 1}),
        "e h",
    ),
    ("Phi3ForCausalLM", "Phi3Config", LLAMA, layers(GROUPED, gated(F)), "e o"),
    ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**BERT}, layers(WHOLE, FFN), "e o"),
    ("CodeGenForCausalLM", "CodeGenConfig", {**GPT2, "rotary_dim": 4}, layers(WHOLE, WIDE), "e o"),
    ("FalconForCausalLM", "FalconConfig", TEXT, layers(ONE_KEY, WIDE), "e"),
    ("FalconForCausalLM", "FalconConfig", {**TEXT, "multi_query": False}, layers(WHOLE, WIDE), "e"),
    (
        "FalconForCausalLM",
        "FalconConfig",
        {**FALCON, "new_decoder_architecture": True},
        layers({(D + 2 * KEYS, D): 1, (D, D): 1}, WIDE),
        "e",
    ),
    (
        "BloomForCausalLM",
        "BloomConfig",
        BLOOM,
        layers(WHOLE, WIDE),
        "e",
    ),
    (
        "MptForCausalLM",
        "MptConfig",
        MPT,
        layers(ALL_HEADS, WIDE),
        "e",
    ),
    ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT2, layers(ONE_KEY, WIDE), "ee"),
    ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", {**GPT2, "multi_query": False}, layers(WHOLE, WIDE), "ee"),
    (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**MIXTURE, "num_local_experts": EXPERTS},
        layers(GROUPED, gated(F, EXPERTS)),
        "e o rr",
    ),
    (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**MIXTURE, **QWEN_MOE},
        layers(GROUPED, gated(16, EXPERTS), gated(24)),
        "e o rr vv",
    ),
    (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**MIXTURE, "num_local_experts": EXPERTS},
        layers(GROUPED, gated(F, EXPERTS)),
        "e o rr tttt",
    ),
    (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**MIXTURE, "num_local_experts": EXPERTS, "interleave_moe_layer_step": 1},
        layers(GROUPED, gated(F, EXPERTS), gated(F)),
        "e o rr",
    ),
    (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**MIXTURE, **DEEPSEEK},
        layers({(16, D): 1, (HEADS * 12, 16): 1, (8, D): 1, (4, D): 1, (HEADS * 16, 8): 1, (D, HEADS * 8): 1})
        + layers(gated(F), gated(16, EXPERTS), gated(16), count=1),
        "e o r",
    ),
    (
        "PhimoeForCausalLM",
        "PhimoeConfig",
        {**MIXTURE, "num_local_experts": EXPERTS},
        layers(GROUPED, gated(F, EXPERTS)),
        "e o rr",
    ),
    (
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        {
            **T5,
            "num_decoder_layers": LAYERS,
            "num_experts": EXPERTS,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
        },
        layers(ALL_HEADS) + layers(ALL_HEADS, ALL_HEADS) + layers(FFN, *[FFN] * EXPERTS, count=2),
        "eee rr",
    ),
    ("ViTForImageClassification", "ViTConfig", VIT, layers(ALL_HEADS, FFN) + Counter([PATCH]), "h tt"),
    (
        "ViTForImageClassification",
        "ViTConfig",
        {**VIT, "num_labels": D},
        layers(ALL_HEADS, FFN) + Counter([PATCH]),
        "h tt",
    ),
    (
        "DeiTForImageClassificationWithTeacher",
        "DeiTConfig",
        VIT,
        layers(ALL_HEADS, FFN) + Counter([PATCH]),
        "hh ttt",
    ),
    ("Dinov2ForImageClassification", "Dinov2Config", VIT, layers(ALL_HEADS, WIDE) + Counter([PATCH]), "h ttt"),
    (
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
        layers(ALL_HEADS, WIDE, count=1)
        + Counter({(16, 16): 4, (64, 16): 1, (16, 64): 1, (32, 4 * 16): 1, (16, 3 * 2 * 2): 1}),
        "h tt",
    ),
    (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4, "num_labels": LABELS},
        Counter([(8, 3 * 4 * 4), (16, 8 * 4), (24, 16 * 4), (32, 24 * 4)])
        + Counter([shape for d in (8, 16, 24, 32) for shape in ((4 * d, d), (d, 4 * d))]),
        "h vvvv",
    ),
    (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": VOCABULARY, "hidden_size": D, "num_hidden_layers": LAYERS, "state_size": 4},
        layers({(2 * D, D): 2, (D // 16, 2 * D): 1, (4, 2 * D): 2, (2 * D, D // 16): 1, (D, 2 * D): 1}),
        "e vv tt",
    ),
    (
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            **{"vocab_size": VOCABULARY, "hidden_size": D, "num_hidden_layers": LAYERS, "state_size": 6},
            **{"num_heads": 4, "head_dim": 16, "n_groups": 2},
        },
        layers({(2 * D, D): 2, (2 * 6, D): 2, (4, D): 1, (D, 2 * D): 1}),
        "e o vv",
    ),
    ("T5ForConditionalGeneration", "T5Config", T5, SEQ2SEQ, "eee"),
    ("T5ForSequenceClassification", "T5Config", T5, SEQ2SEQ + Counter({(D, D): 1}), "eee h"),
    ("BartForConditionalGeneration", "BartConfig", BART, SEQ2SEQ, "eee"),
    ("BartForSequenceClassification", "BartConfig", BART, SEQ2SEQ + Counter({(D, D): 1}), "eee h"),
    (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **{key: value for key, value in BART.items() if not key.startswith("max")},
            **{"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16},
            **dict.fromkeys(NO_TOKENS, 0),
            "decoder_start_token_id": 0,
        },
        SEQ2SEQ + Counter([(D, 8 * KERNEL), (D, D * KERNEL)]),
        "ee f",
    ),
    (
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {**BERT, "projection_dim": 24},
            "vision_config": {**VIT, "projection_dim": 24},
            "projection_dim": 24,
        },
        layers(ALL_HEADS, FFN, count=2 * LAYERS) + Counter({PATCH: 1, (24, D): 2}),
        "eee",
    ),
    (
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        WAV2VEC,
        layers(ALL_HEADS, FFN) + Counter([(16, 4), (16, 16 * 4), (D, 16)]),
        "h tt",
    ),
]
KINDS = {"embedding": "e", "output head": "o", "head": "h", "router": "r", "Conv1d, vectors": "v"}
KINDS |= {"Conv2d, vectors": "v", "Linear, vectors": "v", "does not require": "f"}


TABLES = {"embedding", "cls_token", "position_embeddings", "original0", "original1"}


def build(model, config, options, device="meta"):
    with torch.device(device):
        return getattr(transformers, model)(getattr(transformers, config)(**options))


def kind(row):
    """Letter of what an AdamW or frozen parameter is by its reason: t for tables and tokens."""
    return next((letter for words, letter in KINDS.items() if row.reason.startswith(words)), "t")


@pytest.mark.parametrize(
    ("model", "config", "options", "matrices", "rest"), CASES, ids=lambda x: x if type(x) is str else ""
)
def test_an_architecture_counted(model, config, options, matrices, rest):
    model = build(model, config, options)
    rows = route(model).rows
    assert sorted(map(id, model.parameters())) == sorted(id(row.parameter) for row in rows)
    found = Counter()
    for row in rows:
        for count, m, n in row.view.shapes(tuple(row.parameter.shape)) if row.view else ():
            found[m, n] += count
    assert found == matrices
    others = [row for row in rows if row.algorithm != "orthogonal" and row.parameter.ndim > 1]
    assert Counter(map(kind, others)) == Counter(rest.replace(" ", ""))
    assert not any(row.decay for row in rows if row.algorithm == "adamw" and row.parameter.ndim < 2)


@pytest.mark.parametrize("labels", [1, 2, 3, HEAD, KEYS, D, F, VOCABULARY])
@pytest.mark.parametrize(
    ("model", "config", "options", "head"),
    [
        ("GPT2ForSequenceClassification", "GPT2Config", GPT2, ["score.weight"]),
        ("LlamaForSequenceClassification", "LlamaConfig", LLAMA, ["score.weight"]),
        ("BertForSequenceClassification", "BertConfig", BERT, ["classifier.weight"]),
        ("RobertaForSequenceClassification", "RobertaConfig", BERT, ["classifier.out_proj.weight"]),
        ("BartForSequenceClassification", "BartConfig", BART, ["classification_head.out_proj.weight"]),
        ("ElectraForSequenceClassification", "ElectraConfig", BERT, ["classifier.out_proj.weight"]),
        ("ViTForImageClassification", "ViTConfig", VIT, ["classifier.weight"]),
        ("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", WAV2VEC, ["classifier.weight"]),
    ],
)
def test_a_head_is_found_at_any_number_of_labels_and_no_hidden_layer_is_one(model, config, options, head, labels):
    rows = route(build(model, config, {**options, "num_labels": labels})).rows
    found = [row.name for row in rows if row.algorithm == "adamw" and row.parameter.ndim > 1]
    assert [name for name in found if name in head] == head
    others = [row for row in rows if row.parameter.ndim > 1 and row.name not in head]
    assert {row.reason.split()[0].strip(",") for row in others if row.algorithm == "adamw"} <= TABLES


@pytest.mark.parametrize(
    ("model", "config", "options", "fused", "output", "per_head"),
    [
        ("Phi3ForCausalLM", "Phi3Config", LLAMA, "qkv_proj", "o_proj", False),
        ("MptForCausalLM", "MptConfig", MPT, "Wqkv", "out_proj", False),
        ("FalconForCausalLM", "FalconConfig", TEXT, "query_key_value", "dense", False),
        ("FalconForCausalLM", "FalconConfig", {**TEXT, "multi_query": False}, "query_key_value", "dense", True),
        ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT2, "c_attn", "c_proj", False),
        ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", {**GPT2, "multi_query": False}, "c_attn", "c_proj", True),
        ("GPTNeoXForCausalLM", "GPTNeoXConfig", BERT, "query_key_value", "dense", True),
        ("BloomForCausalLM", "BloomConfig", BLOOM, "query_key_value", "dense", True),
        ("ModernBertModel", "ModernBertConfig", MODERNBERT, "Wqkv", "Wo", False),
    ],
)
def test_the_third_block_is_the_values_that_the_model_computes(model, config, options, fused, output, per_head):
    """Without values the input of the output projection is zero, without queries it is not."""
    torch.manual_seed(0)
    net = build(model, config, options, "cpu").eval()
    inputs = {}
    for name, module in net.named_modules():
        if name.endswith(f".{output}") and "mlp" not in name:
            module.register_forward_hook(lambda _, given, __, name=name: inputs.update({name: given[0]}))
    views = {row.name: row.view for row in route(net, per_head=per_head).rows}
    for part, silent in ((0, False), (2, True)):
        with torch.no_grad():
            for name, p in net.named_parameters():
                if f".{fused}.bias" in name:
                    p.zero_()
                elif f".{fused}.weight" in name:
                    p.normal_()
                    stacks = views[name].view(p)
                    blocks = [block for stack in stacks for block in stack]
                    for block in blocks[part::3]:
                        block.zero_()
            net(torch.arange(5)[None])
        assert inputs
        assert all(bool(given.any()) is not silent for given in inputs.values())


@pytest.mark.parametrize("silent", [0, 1])
def test_the_first_block_of_gpt_oss_is_the_gate_and_the_second_is_up(silent):
    """(up + 1) gate sigmoid(gate): no gate, no result; without up it is that of the gate alone."""
    options = {**MIXTURE, "num_local_experts": EXPERTS, "num_hidden_layers": 1}
    net = build("GptOssForCausalLM", "GptOssConfig", options, "cpu")
    [name] = [name for name, _ in net.named_parameters() if name.endswith("gate_up_proj")]
    row = next(row for row in route(net).rows if row.name == name)
    assert row.reason == f"GptOssExperts, {EXPERTS} experts, 2 fused, row by row"
    experts = net.get_submodule(name.rpartition(".")[0])
    with torch.no_grad():
        for p in experts.parameters():
            p.normal_()
        row.view.view(row.parameter)[silent].zero_()
        result = experts._apply_gate(torch.randn(3, D) @ row.parameter[0])
    assert bool(result.any()) is bool(silent)
