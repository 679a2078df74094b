"""Prompts with pictures, as a processor makes inputs of them."""

from collections.abc import Sequence
from typing import Any


def image_prompt(processor: Any, images: Sequence[Any], text: str, model: Any) -> dict[str, Any]:
    """Inputs of one row: the pictures, then the text, in the processor's chat template.

    Args:
        processor: of a vision-language model.
        images: PIL images.
        text: with a placeholder for every picture it is taken as it is, without the template.
        model: whose device and dtype the inputs get.

    Raises:
        ValueError: the processor has no chat template, and the text no placeholders.
    """
    placeholder = processor.image_token
    if placeholder not in text:
        if not getattr(processor, "chat_template", None):
            raise ValueError(f"{type(processor).__name__} has no chat template: write {placeholder} into the text.")
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    bos = processor.tokenizer.bos_token
    # some templates write the token of the beginning themselves
    once = {"add_special_tokens": False} if bos is not None and text.startswith(bos) else {}
    return dict(processor(images=list(images), text=[text], return_tensors="pt", **once).to(model.device, model.dtype))
