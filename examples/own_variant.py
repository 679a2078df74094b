"""A variant of your own, log-length scaling of the logits, in about twenty lines, checked like the shipped ones."""

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import patchattn


@dataclass(frozen=True, kw_only=True)
class LogNConfig(patchattn.VariantConfig):
    trained_length: int = patchattn.option(
        512, help="Length the model was trained on.", source="ours", unit="tokens", minimum=2
    )


class LogN(patchattn.Variant):
    """Queries beyond the trained length are scaled by log(n) / log(trained length), n the keys they see."""

    config_class = LogNConfig

    def attend(self, call: patchattn.AttentionCall, inner: patchattn.Attend) -> patchattn.AttentionOutput:
        base = torch.tensor(float(self.config.trained_length), device=call.query.device).log()
        factor = (call.visible_keys().clamp(min=1).log() / base).clamp(min=1.0)
        return inner(call.replace(query=call.query * factor[:, None, :, None].to(call.query.dtype)))

    @classmethod
    def neutral_config(cls) -> dict[str, int]:
        return {"trained_length": 1 << 30}


patchattn.register_variant(
    patchattn.VariantInfo(
        name="example_logn",
        variant=LogN,
        title="Scaling of the logits by the logarithm of the length",
        arxiv_id=None,
        year=2021,
        summary="Sharper attention beyond the trained length.",
        extra_parameters="none",
        needs_training=False,
    )
)

if __name__ == "__main__":
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=256)).eval()
    patchattn.patch_model(model, "example_logn", trained_length=8)
    print(patchattn.check_patch(model, torch.randint(3, 256, (2, 24))))
