"""A tiny LLaVA from configurations: a CLIP vision tower with a class token, a projector and a Llama.

It has a tokenizer of whole words and a processor of its own; `recipes/train_tiny_vlm.py` trains it."""

from dataclasses import dataclass

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from ..core.settings import Settings, option
from ..evaluation.tasks import shapes

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>")
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}USER: "
    "{% for part in message.content %}{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}"
    "{% endfor %} ASSISTANT:{% else %} {{ message.content[0].text }}</s>{% endif %}{% endfor %}"
)


@dataclass(frozen=True, kw_only=True)
class TinyVLMSizes(Settings):
    """Sizes of the model.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range, heads that do not divide their width.
    """

    patch_size: int = option(8, help="Side of a patch, which is one token.", unit="pixels", minimum=1)
    vision_width: int = option(64, help="Width of the vision tower.", minimum=1)
    vision_layers: int = option(
        3, help="Layers of the vision tower; the last but one is shown to the Llama.", minimum=2
    )
    vision_heads: int = option(4, help="Heads per layer of the vision tower.", minimum=1)
    text_width: int = option(96, help="Width of the Llama.", minimum=1)
    text_layers: int = option(3, help="Layers of the Llama.", minimum=1)
    text_heads: int = option(4, help="Query heads per layer of the Llama.", minimum=1)
    text_kv_heads: int = option(2, help="Key and value heads per layer of the Llama.", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if shapes.SIDE % self.patch_size:
            raise ValueError(f"patch_size must divide the pictures' side, {shapes.SIDE}, got {self.patch_size}.")
        for whole, part in (
            ("vision_width", "vision_heads"),
            ("text_width", "text_heads"),
            ("text_heads", "text_kv_heads"),
        ):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{whole} ({getattr(self, whole)}) must be a multiple of {part} ({getattr(self, part)})."
                )

    @property
    def patches(self) -> int:
        """Image tokens of a picture."""
        return (shapes.SIDE // self.patch_size) ** 2


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words that knows those of the questions, the answers and the captions."""
    names = " ".join(shapes.OBJECTS).split()
    request = shapes.CAPTION_REQUEST.rstrip("?").split()
    words = [
        "USER",
        "ASSISTANT",
        ":",
        "?",
        ".",
        "Is",
        "there",
        "a",
        "in",
        "the",
        "image",
        "yes",
        "no",
        "is",
        "and",
        "something",
    ]
    vocabulary = list(dict.fromkeys([*SPECIAL, *words, *request, *names]))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary.index("<s>"))]
    )
    names_of = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **names_of,
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=512,
    )


def make_processor(sizes: TinyVLMSizes) -> LlavaProcessor:
    """What makes tokens and pixel values of a prompt and a picture."""
    side = {"height": shapes.SIDE, "width": shapes.SIDE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False),
        tokenizer=make_tokenizer(),
        patch_size=sizes.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which the strategy drops again
        chat_template=TEMPLATE,
    )


def make_model(sizes: TinyVLMSizes, tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The model, with random weights."""
    vision = CLIPVisionConfig(
        image_size=shapes.SIDE,
        patch_size=sizes.patch_size,
        hidden_size=sizes.vision_width,
        intermediate_size=4 * sizes.vision_width,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.vision_heads,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.text_width,
        intermediate_size=3 * sizes.text_width,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=sizes.text_heads,
        num_key_value_heads=sizes.text_kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=sizes.patches,
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)
