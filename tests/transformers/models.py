"""Whole models of the ``transformers`` library from tiny configurations: nothing is downloaded.

An entry names a configuration and a model class, and says how its loss is a sum over examples:

    causal, masked, seq2seq    ``model(**inputs, labels=labels).loss``: a mean over the tokens of the batch that have a label
    classifier                 ``model(**inputs, labels=labels).loss``: a mean over the batch
    features                   a loss outside of the model, on what it returns first
    contrastive                ``model(**inputs, return_loss=True).loss``: examples are each other's negatives
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo import floats, ids, squares

B, T, V = 3, 6, 40
Inputs = Callable[[], dict[str, Any]]
Losses = Callable[[Any, dict[str, Any]], Tensor]


@dataclass(frozen=True, slots=True)
class Entry:
    """``losses(output, inputs)`` is what each example adds to the loss that is trained; ``refused`` matches
    ``name: reason`` of every parameter that cannot be measured."""

    config: str
    model: str
    inputs: Inputs
    losses: Losses
    sizes: dict[str, Any] = field(default_factory=dict)
    refused: str = "^$"

    def build(self, attention: str = "sdpa") -> nn.Module:
        import transformers

        config = getattr(transformers, self.config)(**self.sizes)
        for part in [config, *(c for c in vars(config).values() if isinstance(c, transformers.PreTrainedConfig))]:
            without_dropout(part)
        kind = getattr(transformers, self.model)
        config._attn_implementation = attention if kind._supports_sdpa else "eager"
        model = kind(config).double().train()
        with torch.no_grad():
            for p in model.parameters():  # away from zeros, ones and symmetric starts
                p.add_(torch.randn_like(p), alpha=0.2)
        return model


def without_dropout(config: Any) -> None:
    for name, value in list(vars(config).items()):
        if isinstance(value, float) and ("drop" in name or name == "mask_time_prob"):
            setattr(config, name, 0.0)


MODELS: dict[str, Entry] = {}


def add(
    name: str, config: str, model: str, inputs: Inputs, losses: Losses, /, refused: str = "^$", **sizes: Any
) -> None:
    MODELS[name] = Entry(config, model, inputs, losses, sizes, refused)


# ------------------------------------------------------------------------------------------------------ inputs, losses


def tokens() -> dict[str, Tensor]:
    return {"input_ids": ids(V, B, T)}


def text() -> dict[str, Tensor]:
    """The last example is padded; the second starts with a prompt that has no labels."""
    values, labels, mask = ids(V, B, T), ids(V, B, T), torch.ones(B, T, dtype=torch.int64)
    labels[1, :2] = labels[2, 4:] = -100
    mask[2, 4:] = 0
    return {"input_ids": values, "attention_mask": mask, "labels": labels}


def pairs() -> dict[str, Tensor]:
    given = text()
    given["labels"] = ids(V, B, T - 1)
    given["labels"][1, 3:] = -100
    return given


def unpadded() -> dict[str, Tensor]:
    given = text()
    del given["attention_mask"]
    return given


def images(size: int = 8) -> Inputs:
    return lambda: {"pixel_values": floats(B, 3, size, size)}


def labelled(inputs: Inputs, classes: int = 5) -> Inputs:
    return lambda: {**inputs(), "labels": ids(classes, B)}


def of_tokens(shift: int) -> Losses:
    def losses(output: Any, inputs: dict[str, Tensor]) -> Tensor:
        logits, labels = output.logits[:, : T - shift], inputs["labels"][:, shift:]
        each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
        return each.view_as(labels).sum(1) / (labels != -100).sum()

    return losses


def of_classes(output: Any, inputs: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(output.logits, inputs["labels"], reduction="none") / B


def of_pairs(output: Any, inputs: dict[str, Any]) -> Tensor:
    """No loss of single examples exists: a share each, which only the sum is compared with."""
    return output.loss.expand(B) / B


def of_pooled(output: Any, inputs: dict[str, Any]) -> Tensor:
    return squares(output.pooler_output) / B


def of_features(output: Any, inputs: dict[str, Tensor]) -> Tensor:
    return squares(output[0]) / B


# --------------------------------------------------------------------------------------------------------------- models
# fmt: off

def causal(name: str, prefix: str, inputs: Inputs = text, kind: str = "ForCausalLM", **sizes: Any) -> None:
    add(name, f"{prefix}Config", f"{prefix}{kind}", inputs, of_tokens(1), vocab_size=V, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, **sizes)


def masked(name: str, prefix: str, **sizes: Any) -> None:
    add(name, f"{prefix}Config", f"{prefix}ForMaskedLM", text, of_tokens(0),
        **{"vocab_size": V, "pad_token_id": 0, **sizes})


def seq2seq(name: str, prefix: str, **sizes: Any) -> None:
    add(name, f"{prefix}Config", f"{prefix}ForConditionalGeneration", pairs, of_tokens(0),
        **{"vocab_size": V, "pad_token_id": 0, "decoder_start_token_id": 1, "bos_token_id": 1, "eos_token_id": 2, **sizes})


def vision(name: str, prefix: str, size: int = 8, **sizes: Any) -> None:
    add(name, f"{prefix}Config", f"{prefix}ForImageClassification", labelled(images(size)), of_classes, num_labels=5, **sizes)


SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 16}
GROUPED = {**SMALL, "num_key_value_heads": 2}
TOWER = {k: v for k, v in SMALL.items() if k != "max_position_embeddings"}

# decoders
causal("GPT-2", "GPT2", kind="LMHeadModel", n_embd=16, n_layer=2, n_head=2, n_positions=16)
causal("Llama", "Llama", **GROUPED)
causal("Qwen3", "Qwen3", head_dim=8, **GROUPED)
causal("Gemma 2", "Gemma2", head_dim=8, query_pre_attn_scalar=8, sliding_window=4, **GROUPED)
causal("OPT", "OPT", hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=16,
       word_embed_proj_dim=16)
causal("GPT-NeoX", "GPTNeoX", **SMALL)
causal("GPT-J", "GPTJ", n_embd=16, n_layer=2, n_head=2, n_positions=16, rotary_dim=4)
causal("GPT-Neo", "GPTNeo", hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
       window_size=4, max_position_embeddings=16)
causal("Phi", "Phi", **SMALL)
causal("Phi-3", "Phi3", **GROUPED)
causal("Falcon", "Falcon", hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
causal("Bloom", "Bloom", hidden_size=16, n_layer=2, n_head=4)
causal("Mistral", "Mistral", head_dim=4, sliding_window=4, **GROUPED)
causal("Granite", "Granite", **GROUPED)
causal("OLMo", "Olmo", **GROUPED)
causal("OLMo 2", "Olmo2", **GROUPED)
add("Gemma 3", "Gemma3TextConfig", "Gemma3ForCausalLM", text, of_tokens(1), vocab_size=V, pad_token_id=0, head_dim=8,
    query_pre_attn_scalar=8, sliding_window=4, **GROUPED)
causal("Cohere", "Cohere", **GROUPED)
causal("StableLM", "StableLm", **GROUPED)
causal("MPT", "Mpt", d_model=16, n_heads=2, n_layers=2, expansion_ratio=2, max_seq_len=16)

# experts
EXPERTS = {**GROUPED, "num_experts_per_tok": 2}
MLA = {**SMALL, "num_key_value_heads": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "n_routed_experts": 4,
       "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
       "qk_nope_head_dim": 4, "v_head_dim": 8}
causal("Mixtral", "Mixtral", num_local_experts=4, **EXPERTS)
causal("Mixtral, batched_mm", "Mixtral", num_local_experts=4, experts_implementation="batched_mm", **EXPERTS)
causal("DeepSeek-V2", "DeepseekV2", topk_method="greedy", n_group=1, topk_group=1, **MLA)
causal("DeepSeek-V3", "DeepseekV3", n_group=2, topk_group=1, **MLA)
causal("GPT-OSS", "GptOss", num_local_experts=4, head_dim=8, sliding_window=4, **EXPERTS)
causal("Qwen2-MoE", "Qwen2Moe", num_experts=4, moe_intermediate_size=12, shared_expert_intermediate_size=12, **EXPERTS)

# state spaces and recurrences
causal("Mamba", "Mamba", inputs=unpadded, hidden_size=16, state_size=4, num_hidden_layers=2)
causal("Mamba 2", "Mamba2", inputs=unpadded, hidden_size=16, state_size=4, num_hidden_layers=2, num_heads=4, head_dim=8, n_groups=2,
       chunk_size=4)
causal("RWKV", "Rwkv", inputs=unpadded, hidden_size=16, num_hidden_layers=2, context_length=16)

# encoders
masked("BERT", "Bert", **SMALL)
masked("RoBERTa", "Roberta", **SMALL)
masked("ALBERT", "Albert", embedding_size=8, **SMALL)
masked("DistilBERT", "DistilBert", dim=16, hidden_dim=24, n_layers=2, n_heads=4, max_position_embeddings=16)
masked("ELECTRA", "Electra", embedding_size=8, **SMALL)
masked("DeBERTa-v2", "DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=4,
       share_att_key=True, norm_rel_ebd="layer_norm", conv_kernel_size=3, **SMALL)
masked("ModernBERT", "ModernBert", local_attention=4, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, **SMALL)

# encoder and decoder
seq2seq("T5", "T5", d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, relative_attention_num_buckets=8)
seq2seq("BART", "Bart", d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=16)

# images
IMAGE = {"image_size": 8, "patch_size": 4}
vision("ViT", "ViT", **IMAGE, **SMALL)
vision("DeiT", "DeiT", **IMAGE, **SMALL)
vision("BEiT", "Beit", use_relative_position_bias=True, use_shared_relative_position_bias=False, **IMAGE, **SMALL)
vision("DINOv2", "Dinov2", **IMAGE, **SMALL)
vision("ConvNeXt", "ConvNext", size=16, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2)
vision("Swin", "Swin", size=16, image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=2)
BATCH_STATISTICS = "gradient summed over the batch is combined with single examples again"
vision("ResNet", "ResNet", size=16, refused=BATCH_STATISTICS, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])

# sound
SPEECH = {**TOWER, "conv_dim": [8, 8], "conv_stride": [2, 2], "conv_kernel": [3, 3], "num_feat_extract_layers": 2,
          "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
WAVE: Inputs = lambda: {"input_values": floats(B, 40)}  # noqa: E731
add("Wav2Vec2", "Wav2Vec2Config", "Wav2Vec2Model", WAVE, of_features, **SPEECH)
add("HuBERT", "HubertConfig", "HubertModel", WAVE, of_features, **SPEECH)
add("Whisper", "WhisperConfig", "WhisperForConditionalGeneration", lambda: {
        "input_features": floats(B, 8, 12), "labels": pairs()["labels"]}, of_tokens(0),
    d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
    decoder_ffn_dim=24, num_mel_bins=8, max_source_positions=6, max_target_positions=16, vocab_size=V, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)

# towers of contrastive models, and both together
add("CLIP text", "CLIPTextConfig", "CLIPTextModelWithProjection", tokens, of_features, vocab_size=V, projection_dim=8,
    eos_token_id=2, **SMALL)
add("CLIP vision", "CLIPVisionConfig", "CLIPVisionModelWithProjection", images(), of_features, projection_dim=8, **IMAGE, **TOWER)
add("SigLIP text", "SiglipTextConfig", "SiglipTextModel", tokens, of_pooled, vocab_size=V, **SMALL)
add("SigLIP vision", "SiglipVisionConfig", "SiglipVisionModel", images(), of_pooled, **IMAGE, **TOWER)
NEGATIVES = "in-batch negatives"
BOTH: Inputs = lambda: {**tokens(), **images()(), "return_loss": True}  # noqa: E731
add("CLIP, contrastive", "CLIPConfig", "CLIPModel", BOTH, of_pairs, refused=NEGATIVES, projection_dim=8,
    text_config={"vocab_size": V, "eos_token_id": 2, **SMALL}, vision_config={**IMAGE, **TOWER})
add("SigLIP, contrastive", "SiglipConfig", "SiglipModel", BOTH, of_pairs, refused=NEGATIVES,
    text_config={"vocab_size": V, "projection_size": 16, **SMALL}, vision_config={**IMAGE, **TOWER})
