"""What the tests of saving share."""

import hashlib
import json

import torch

import patchattn

from .families import FAMILIES, outputs

SETTINGS = {"ssa": {"key": True}, "moh": {"router": "learned", "active_ratio": 0.5}}


def base(name="llama"):
    return FAMILIES[name].make()


def patch(model, settings=SETTINGS):
    """Both variants, with parameters far from where they start."""
    patchattn.patch_model(model, list(settings), settings if len(settings) > 1 else next(iter(settings.values())))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".patchattn." in name:
                parameter.normal_(std=0.3)
    return model


def run(model, name="llama"):
    return outputs(model, **FAMILIES[name].inputs())


def equal(left, right):
    """Equal but for what the layout of loaded tensors in memory does: gpt-oss differs by 2e-7 without any patch."""
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(left, right, strict=True))


def sign(folder):
    """Write the digest of a patch's tensors into its configuration, as if they had been saved like this."""
    path = folder / "patchattn_config.json"
    digest = hashlib.sha256((folder / "patchattn_model.safetensors").read_bytes()).hexdigest()
    path.write_text(json.dumps({**json.loads(path.read_text()), "tensors_sha256": digest}))
