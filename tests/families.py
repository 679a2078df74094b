"""Tiny random models of the families that the behaviour suite runs, with inputs for each."""

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

VOCABULARY = 64
LENGTH = 9
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GQA = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8}
_IMAGE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        name: model type.
        build: makes the model; weights come from torch's seed.
        inputs: makes the inputs of a batch of two.
        kind: decoder, encoder, encoder_decoder, vision or multimodal.
        options: what the suite must know: `implementation` and `dtype` where the model needs them.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, torch.Tensor]]
    kind: str
    options: dict[str, Any] = field(default_factory=dict)

    def make_exact(self) -> nn.Module:
        """The model in float64, where padding and caching may change no more than the order of sums."""
        return self.make().to(self.options.get("dtype", torch.float64))

    def make(self, seed: int = 0, implementation: str | None = None) -> nn.Module:
        """A model in evaluation mode, float32, with weights large enough for attention to be far from uniform."""
        model, state = _made(self.build, seed, implementation or self.options.get("implementation"))
        torch.set_rng_state(state)
        return copy.deepcopy(model)


@functools.cache
def _made(build: Callable[[], nn.Module], seed: int, implementation: str | None) -> tuple[nn.Module, torch.Tensor]:
    """A model that nobody changes, as copies take half the time; and the state in which it leaves torch's generator."""
    torch.manual_seed(seed)
    model = build()
    if implementation:
        model.set_attn_implementation(implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return model.eval(), torch.get_rng_state()


def _tokens(length: int = LENGTH) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(3, VOCABULARY, (2, length), generator=generator)}


def _seq2seq() -> dict[str, torch.Tensor]:
    """In no decoder's row a token comes twice: T5's keys say no positions, and rounding would choose between them."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randperm(VOCABULARY - 3, generator=generator)[:6] + 3 for _ in range(2)]
    return {**_tokens(), "decoder_input_ids": torch.stack(rows)}


def _pixels() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


def _audio() -> dict[str, torch.Tensor]:
    features = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(1))
    return {"input_features": features, "decoder_input_ids": _tokens(6)["input_ids"]}


def _clip() -> nn.Module:
    text = {**_TEXT, "max_position_embeddings": 16}
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=_IMAGE, projection_dim=16))


def _siglip() -> nn.Module:
    text = {**_TEXT, "max_position_embeddings": LENGTH, "projection_size": 32}
    return tf.SiglipModel(tf.SiglipConfig(text_config=text, vision_config=_IMAGE))


def _llava() -> nn.Module:
    config = tf.LlavaConfig(
        text_config=tf.LlamaConfig(**_GQA), vision_config=tf.CLIPVisionConfig(**_IMAGE), image_token_index=63
    )
    return tf.LlavaForConditionalGeneration(config)


def _llava_inputs() -> dict[str, torch.Tensor]:
    tokens = _tokens(22)["input_ids"].clamp(max=62)
    tokens[:, 2:18] = 63  # 16 patches
    return {"input_ids": tokens, **_pixels()}


def _qwen_vl() -> nn.Module:
    text = {**_GQA, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "out_hidden_size": 32,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    config = tf.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=63, vision_start_token_id=62, vision_end_token_id=61
    )
    return tf.Qwen2_5_VLForConditionalGeneration(config)


def _qwen_vl_inputs() -> dict[str, torch.Tensor]:
    tokens = _tokens(12)["input_ids"].clamp(max=60)
    tokens[:, 2], tokens[:, 3:7], tokens[:, 7] = 62, 63, 61
    patches = torch.randn(32, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))
    return {
        "input_ids": tokens,
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
        "mm_token_type_ids": (tokens == 63).int(),
    }


def _gpt_oss() -> nn.Module:
    config = tf.GptOssConfig(**_GQA, num_local_experts=2, num_experts_per_tok=1, sliding_window=4)
    model = tf.GptOssForCausalLM(config)
    model.set_experts_implementation("eager")  # the grouped product knows no float64
    return model


def _gemma3() -> nn.Module:
    return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_GQA, sliding_window=4, query_pre_attn_scalar=8))


def _modernbert() -> nn.Module:
    return tf.ModernBertForMaskedLM(tf.ModernBertConfig(**_TEXT, local_attention=4))


def _whisper() -> nn.Module:
    layers = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("ffn_dim", 48))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "num_mel_bins": 8, "max_source_positions": 12}
    config = tf.WhisperConfig(**layers, **heads, **special, **sizes, max_target_positions=32)
    return tf.WhisperForConditionalGeneration(config)


def _bart() -> nn.Module:
    layers = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("ffn_dim", 48))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = tf.BartConfig(vocab_size=VOCABULARY, d_model=32, max_position_embeddings=40, **layers, **heads)
    return tf.BartForConditionalGeneration(config)


def _t5() -> nn.Module:
    config = tf.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return tf.T5ForConditionalGeneration(config)


def _decoder(model: str, config: str, **extra: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(tf, model)(getattr(tf, config)(**{**_TEXT, **extra}))


def _encoder(model: str, config: str, **extra: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(tf, model)(getattr(tf, config)(**{**_TEXT, "max_position_embeddings": 40, **extra}))


def _vision(model: str, config: str) -> Callable[[], nn.Module]:
    return lambda: getattr(tf, model)(getattr(tf, config)(**_IMAGE))


_KV = {"num_key_value_heads": 2, "head_dim": 8}
_GPT2 = {"n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in [
        Family("llama", _decoder("LlamaForCausalLM", "LlamaConfig", **_KV), _tokens, "decoder"),
        Family("mistral", _decoder("MistralForCausalLM", "MistralConfig", **_KV, sliding_window=4), _tokens, "decoder"),
        Family("qwen3", _decoder("Qwen3ForCausalLM", "Qwen3Config", **_KV), _tokens, "decoder"),
        Family(
            "gemma2",
            _decoder("Gemma2ForCausalLM", "Gemma2Config", **_KV, sliding_window=4, query_pre_attn_scalar=8),
            _tokens,
            "decoder",
            # No other implementation caps logits on a CPU. In float64 the base makes NaN of padded rows: its softmax is
            # in float32, where float64's lowest number is -inf.
            {"implementation": "eager", "dtype": torch.float32},
        ),
        Family("gemma3_text", _gemma3, _tokens, "decoder"),
        Family("phi3", _decoder("Phi3ForCausalLM", "Phi3Config", num_key_value_heads=2), _tokens, "decoder"),
        Family("gpt2", _decoder("GPT2LMHeadModel", "GPT2Config", **_GPT2), _tokens, "decoder"),
        Family("gpt_neox", _decoder("GPTNeoXForCausalLM", "GPTNeoXConfig"), _tokens, "decoder"),
        Family("opt", _decoder("OPTForCausalLM", "OPTConfig", ffn_dim=48, word_embed_proj_dim=32), _tokens, "decoder"),
        Family("gpt_oss", _gpt_oss, _tokens, "decoder", {"implementation": "eager"}),
        Family("bert", _encoder("BertForMaskedLM", "BertConfig"), _tokens, "encoder"),
        Family("roberta", _encoder("RobertaForMaskedLM", "RobertaConfig"), _tokens, "encoder"),
        Family(
            "distilbert",
            lambda: tf.DistilBertModel(
                tf.DistilBertConfig(vocab_size=VOCABULARY, dim=32, hidden_dim=48, n_layers=2, n_heads=4)
            ),
            _tokens,
            "encoder",
        ),
        Family("electra", _encoder("ElectraForPreTraining", "ElectraConfig", embedding_size=32), _tokens, "encoder"),
        Family("modernbert", _modernbert, _tokens, "encoder"),
        Family("t5", _t5, _seq2seq, "encoder_decoder"),
        Family("bart", _bart, _seq2seq, "encoder_decoder"),
        Family("whisper", _whisper, _audio, "encoder_decoder"),
        Family("vit", _vision("ViTForImageClassification", "ViTConfig"), _pixels, "vision"),
        Family("deit", _vision("DeiTForImageClassification", "DeiTConfig"), _pixels, "vision"),
        Family("dinov2", _vision("Dinov2Model", "Dinov2Config"), _pixels, "vision"),
        Family("clip", _clip, lambda: {**_tokens(), **_pixels()}, "multimodal"),
        Family("siglip", _siglip, lambda: {**_tokens(), **_pixels()}, "multimodal"),
        Family("llava", _llava, _llava_inputs, "multimodal"),
        # Its rotary angles are computed in float32 from positions that padding shifts.
        Family("qwen2_5_vl", _qwen_vl, _qwen_vl_inputs, "multimodal", {"dtype": torch.float32}),
    ]
}


def of_kind(*kinds: str) -> list[str]:
    """Names of the families of some kinds."""
    return [name for name, family in FAMILIES.items() if family.kind in kinds]


def shortened(model: nn.Module, layers: int = 1) -> nn.Module:
    """A model of text with its first layers alone, in place: compilers are slow."""
    for stack in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        del stack[layers:]
        model.config.num_hidden_layers = len(stack)
    return model


def outputs(model: nn.Module, **inputs: Any) -> list[torch.Tensor]:
    """All floating tensors of a forward pass that depend on attention: logits, hidden states, embeddings."""
    with torch.no_grad():
        result = model(**inputs)
    names = ("logits", "last_hidden_state", "logits_per_text", "encoder_last_hidden_state", "image_hidden_states")
    found = [result[name] for name in names if isinstance(result.get(name), torch.Tensor)]
    if not found:
        raise AssertionError(f"{type(result).__name__} has no output to compare")
    return found


def each_of(names: Iterable[str]) -> Any:
    """A fixture that gives each of these names."""

    @pytest.fixture(params=list(names))
    def name(request: pytest.FixtureRequest) -> str:
        return str(request.param)

    return name
