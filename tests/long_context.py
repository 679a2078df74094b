"""A tokenizer whose prompts can be read, a tiny model, and one that reads its prompt and answers."""

import re
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.generation import GenerateDecoderOnlyOutput

CHAT = "{{ bos_token }}<user>{% for m in messages %}{{ m['content'] }}{% endfor %}<model>"
SPECIAL = ["<pad>", "<s>", "</s>"]


def byte_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """A token per byte, and one at the beginning."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    fast = Tokenizer(models.BPE(vocabulary, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    found = PreTrainedTokenizerFast(tokenizer_object=fast, clean_up_tokenization_spaces=False, **names)
    found.chat_template = template
    return found


BYTES, BYTES_CHAT = byte_tokenizer(), byte_tokenizer(CHAT)


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = LlamaConfig(vocab_size=len(BYTES), initializer_range=0.3, **{**sizes, **ends, **changes})
    return LlamaForCausalLM(config).eval()


class Reader(nn.Module):
    """Stands for a model: it looks for a pattern in the last bytes of its prompt and says what it finds.

    Args:
        pattern: of a regular expression; its first groups are the answer, or all of it without groups.
        sight: how many bytes before the answer it sees.
    """

    def __init__(self, pattern: str, sight: int = 10**9) -> None:
        super().__init__()
        self.pattern, self.sight = pattern, sight
        self.config = SimpleNamespace(is_encoder_decoder=False, get_text_config=SimpleNamespace)
        self.generation_config = SimpleNamespace(eos_token_id=2)
        self.device = torch.device("cpu")

    def generate(self, input_ids: torch.Tensor, stopping_criteria: Any, max_new_tokens: int, **_: Any) -> Any:
        answers = []
        for row in input_ids:
            seen = BYTES.decode(row[-self.sight :], skip_special_tokens=True)
            said = BYTES(" ".join(re.findall(self.pattern, seen)), add_special_tokens=False)["input_ids"]
            answers.append([*said, *[2] * max_new_tokens][:max_new_tokens])
        for criterion in stopping_criteria:
            criterion(input_ids, None)
        return GenerateDecoderOnlyOutput(sequences=torch.cat([input_ids, torch.tensor(answers)], dim=1))
