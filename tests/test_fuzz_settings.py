"""Random settings: they work and stay finite, or are refused in words, and a model comes back as it was."""

import json
import random

import pytest
import torch

import patchattn
from patchattn.core.patching import is_patched

from .families import FAMILIES, outputs
from .vlms import inputs as vlm_inputs
from .vlms import make as make_vlm

COUNT, SEED = 2000, 13
MISTAKES = (ValueError, TypeError, NotImplementedError)
MODELS = {
    "llama": (lambda: FAMILIES["llama"].make(), lambda: FAMILIES["llama"].inputs()),
    "bert": (lambda: FAMILIES["bert"].make(), lambda: FAMILIES["bert"].inputs()),
    "llava": (lambda: make_vlm("llava"), lambda: vlm_inputs("llava")),
}
# One that the variant is for, twice as often as all others.
HOME = {"shrp": "bert", "damro": "llava", "var": "llava"}
STRANGE = (
    0, 1, 2, 3, -1, 4, 7, 10**6, 2**31, 2**63, 10**30, 10**400, -(10**400),
    0.0, -0.0, 0.25, 0.5, 1.0, 1.5, -0.5, 1e-3, 1e3, 1e30, 1e38, 1e39, 1e308, -1e308, 5e-324,
    float("inf"), float("-inf"), float("nan"),
    True, False, None, "", "x", "0.5", "1e999", "x" * 5000, "nan", b"x", 1j,
    (), [], {}, [0], [0, 1], [0.5, 0.5], [1, "x"], [[0, 1]], [[0, 0], [1, 2]], [None], (0.5,) * 4,
    {"0": [1]}, {0: [1]}, {"x": [1]}, {0: 1}, {"heads": {"0": [0]}}, {"model.layers.0.self_attn": [1]},
    range(2), {1, 2}, object(), float, torch.ones(2), lambda: None,
)  # fmt: skip


def choice_of(draw, field):
    """A value for one setting: often one that it takes, else anything."""
    kind = draw.random()
    if kind < 0.35 and field["choices"]:
        return draw.choice(field["choices"])
    if kind < 0.55 and (field["minimum"] is not None or field["maximum"] is not None):
        low, high = field["minimum"], field["maximum"]
        low, high = -1000.0 if low is None else low, 1e6 if high is None else high
        return draw.choice([low, high, draw.uniform(low, high), int(low), int(high)])
    if kind < 0.7:
        return field["default"] if isinstance(field["default"], str | int | float | tuple | None) else None
    return draw.choice(STRANGE)


def some_settings(draw, info):
    examples = [dict(example) for example in info.examples]
    settings = draw.choice([{}, draw.choice(examples), info.variant.neutral_config()])
    if info.presets and draw.random() < 0.2:
        settings = {"preset": draw.choice([*info.presets, "x", None, 3])}
    fields = info.config_fields
    for name in draw.sample(sorted(fields), draw.randint(0, min(3, len(fields)))):
        settings[name] = choice_of(draw, fields[name])
    if draw.random() < 0.03:
        settings[draw.choice(["x", "", "variant"])] = 1
    return settings


@pytest.mark.slow
def test_random_settings_work_or_are_refused(tmp_path):
    draw = random.Random(SEED)
    models = {name: make() for name, (make, _) in MODELS.items()}
    inputs = {name: make() for name, (_, make) in MODELS.items()}
    expected = {name: outputs(model, **inputs[name]) for name, model in models.items()}
    worked, wrong = dict.fromkeys(patchattn.list_variants(), 0), []
    for number in range(COUNT):
        variant = draw.choice(patchattn.list_variants())
        info, name = patchattn.variant_info(variant), HOME.get(variant, "llama")
        if draw.random() < 0.15:
            name = draw.choice(sorted(MODELS))
        settings, model = some_settings(draw, info), models[name]
        torch.manual_seed(number)
        try:
            if patch(model, variant, settings) and check(model, info, inputs[name]):
                if worked[variant] % 8 == 0:
                    check_saved(model, MODELS[name][0](), inputs[name], tmp_path / "patch")
                worked[variant] += 1
        except Exception as error:
            text = f"{type(error).__name__}: {error}"[:300]
            wrong.append(f"number {number}: {variant} on {name}, {str(settings)[:300]}: {text}")
        if is_patched(model):
            patchattn.unpatch_model(model)
    assert not wrong, "\n".join(wrong)
    for name, model in models.items():
        assert all(torch.equal(a, b) for a, b in zip(outputs(model, **inputs[name]), expected[name], strict=True)), name
    assert min(worked.values()) > 20, worked  # neither everything nor nothing of a variant is refused


def patch(model, variant, settings):
    """Whether a model could be patched; if not, that was said in words, and it is as it was."""
    try:
        patchattn.patch_model(model, variant, settings)
    except MISTAKES as error:
        message = str(error)
    else:
        return True
    assert not is_patched(model)
    assert 0 < len(message) < 2500, message
    return False


def check(model, info, inputs):
    """A patched model computes numbers, and its settings survive JSON; false if it refuses these inputs in words."""
    try:
        found = outputs(model, **inputs)
    except MISTAKES as error:  # what can be said of inputs alone, such as fewer image tokens than are asked for
        return not str(error)
    for tensor in found:
        # a decoding variant may exclude tokens, but not all
        excluded = tensor == -torch.inf if info.kind == "decoding" else torch.zeros_like(tensor, dtype=torch.bool)
        assert bool((tensor.isfinite() | excluded).all()), "not finite"
        assert not bool(excluded.all(-1).any()), "no token is left"
    for one in patchattn.patch_info(model)["patches"]:
        again = info.variant.config_class.from_dict(json.loads(json.dumps(one["config"])))
        assert again.to_dict() == one["config"]
    return True


def check_saved(model, fresh, inputs, folder):
    """What is patched can be saved, and loaded it computes the same."""
    patchattn.save_patch(model, folder)
    patchattn.load_patch(fresh, folder)
    pairs = zip(outputs(fresh, **inputs), outputs(model, **inputs), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs), "loads another"
