"""What `test_fuzz_kills.py` runs in processes that it kills."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import patchattn

CONFIG = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
SAVE = {"save_patch": patchattn.save_patch, "save_pretrained": patchattn.save_pretrained}


def model_of(number):
    """A patched model whose settings, variants' tensors and other weights all say the same number."""
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    patchattn.patch_model(model, "ssmax", initial_scale=number / 100)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(number)
    return model


def base_model():
    return LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()


def numbers_of(model, *, whole):
    """The numbers that a model's settings and tensors say; more than one are of several saves."""
    (patch,) = patchattn.patch_info(model)["patches"]
    found = {round(patch["config"]["initial_scale"] * 100)}
    for name, tensor in model.named_parameters():
        if whole or ".patchattn." in name:
            found |= set(tensor.unique().tolist())
    return found


def save_again_and_again(kind, folder, saved):
    """Save other numbers over each other until the process is killed; `saved` counts."""
    torch.set_num_threads(1)
    models = [model_of(number) for number in range(1, 5)]
    while True:
        for model in models:
            SAVE[kind](model, folder)
            saved.value += 1
