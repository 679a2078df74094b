"""What `patchattn plot` needs before it can draw: options that are checked first, then a model and its inputs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_FORMATS = (".pdf", ".png", ".svg")


def check_output(path: Path) -> None:
    """ValueError for a file that could not be written after all the work."""
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"--output must end in {', '.join(_FORMATS)}, got {str(path)!r}.")
    if not path.parent.is_dir():
        raise ValueError(f"There is no folder {str(path.parent)!r} to write {path.name} to.")


class Source:
    """A model, patched as it was saved or as the options say. Making one checks all that needs no weights.

    Attributes:
        name: of the model, for titles.
        decodes: whether it is a causal language model.
        has_patch: whether anything is patched in, as it was saved or as the options say.
        base: folder or Hub id of the base model, which has the tokenizer.
    """

    def __init__(
        self, model: str, variant: str | None = None, settings: Sequence[str] | None = None, patch: Path | None = None
    ) -> None:
        from ..core.registry import variant_info
        from ..saving.patch_files import read_patch
        from ..saving.whole_model import model_class
        from .common import quiet

        if variant is not None and patch is not None:
            raise ValueError("Give --variant or --patch, not both: a saved patch says what it is.")
        self.model, self.patch, self.plan = model, patch, _plan(variant, settings or [])
        named = list(self.plan)
        if patch is not None:
            refuse_variant(patch)
            named = [part.variant for part in read_patch(patch).patches]
        quiet()
        self.base, self.architecture, saved = _find(model)
        self.is_patched = bool(saved)
        if self.is_patched and (variant or patch):
            raise ValueError(f"{model} was saved patched: leave out --variant and --patch, or give its base model.")
        # of those that compute attention weights themselves, eager attention gives the weights; others compute anew
        self.needs_eager = any(variant_info(name).innermost for name in [*named, *saved])
        self.has_patch = self.is_patched or bool(self.plan) or patch is not None
        self.kind = model_class(self.architecture)
        self.decodes = self.kind.__name__.endswith(("ForCausalLM", "LMHeadModel"))
        self.name = f"{Path(model).name}{f' with {variant}' if variant else ''}"

    def load(self, device: str | None) -> Any:
        """The model, in evaluation mode."""
        from ..core.patching import patch_model
        from ..saving.checkpoint import from_pretrained, load_patch
        from ..saving.pretrained import load_pretrained
        from .devices import choose_device

        chosen = choose_device(device)
        how = {"dtype": "auto", **({"attn_implementation": "eager"} if self.needs_eager else {})}
        if self.is_patched:
            loaded = from_pretrained(self.model, **how)
        else:
            loaded = load_pretrained(self.kind, self.model, **how)
        if self.patch is not None:
            load_patch(loaded, self.patch)
        if self.plan:
            config = self.plan if len(self.plan) > 1 else next(iter(self.plan.values()))
            patch_model(loaded, list(self.plan), config)
        return loaded.eval().to(chosen)

    def tokenizer(self) -> Any:
        """Of the base model."""
        from transformers import AutoTokenizer

        from ..saving.pretrained import load_pretrained

        return load_pretrained(AutoTokenizer, self.base)


def refuse_variant(patch: str | Path) -> None:
    """ValueError where the name of a variant was given for the folder of a saved patch."""
    from ..core.registry import list_variants

    if str(patch) in list_variants() and not Path(patch).exists():
        raise ValueError(f"{str(patch)!r} is a variant: give --variant {patch}. A patch is a folder that was saved.")


def _plan(variant: str | None, settings: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Variants to their settings, of `name=value`, or `variant.name=value` where there are several."""
    from ..core.registry import variant_info
    from .common import parse_settings

    plan: dict[str, dict[str, Any]] = {name.strip(): {} for name in variant.split("+")} if variant else {}
    for key, value in parse_settings(settings).items():
        owner, dot, setting = key.rpartition(".")
        if not dot and len(plan) == 1:
            owner = next(iter(plan))
        if owner not in plan:
            raise ValueError(
                f"--set {key}: there is no --variant {owner}."
                if dot
                else f"--set {key} needs --variant; and where that names several, whose it is: moh.{key}=..."
            )
        plan[owner][setting] = value
    for name, given in plan.items():
        variant_info(name).configure(given)
    return plan


def _find(model: str) -> tuple[str, str | None, list[str]]:
    """Base model, architecture, and the variants that it was saved with."""
    from transformers import AutoConfig

    from ..saving.checkpoint import is_patch_alone
    from ..saving.patch_files import read_patch
    from ..saving.pretrained import load_pretrained
    from ..saving.whole_model import saved_plan

    folder = Path(model)
    if is_patch_alone(folder):
        saved = read_patch(folder)
        named = [part.variant for part in saved.patches]
        return saved.base.get("name_or_path") or model, saved.base.get("architecture"), named
    config = load_pretrained(AutoConfig, model)
    return model, (config.architectures or [None])[0], [part.variant for part in saved_plan(model) or ()]


def one_text(prompt: str | None, text: Path | None) -> str:
    """The text to look at: given, or the first of a file; ValueError for neither or both."""
    from ..calibration.data import read_texts

    if (prompt is None) == (text is None):
        raise ValueError("Give the text: either --prompt or --text.")
    if text is not None and not text.exists():
        raise ValueError(f"There is no file {str(text)!r}. Give words by --prompt, a file of them by --text.")
    return read_texts(text)[0].text if text is not None else str(prompt)


def tokens_of(tokenizer: Any, text: str, length: int, model: Any) -> tuple[dict[str, Any], list[str]]:
    """Inputs of one row, and the text of every token."""
    encoded = tokenizer(text, return_tensors="pt", truncation=True, max_length=length)
    names = [tokenizer.decode([token]) for token in encoded["input_ids"][0].tolist()]
    return dict(encoded.to(model.device)), names


def image_inputs(processor: Any, path: Path, prompt: str, model: Any) -> tuple[dict[str, Any], Any]:
    """Inputs of one image and a text, and the picture as the vision encoder sees it.

    Raises:
        ValueError: no readable image; or neither a chat template nor a placeholder in the text.
    """
    from ..vision.prompts import image_prompt

    image = opened_image(path)
    inputs = image_prompt(processor, [image], prompt, model)
    return inputs, _seen(processor, inputs["pixel_values"], image)


def opened_image(path: Path) -> Any:
    """A picture in RGB; ValueError where it is none."""
    from PIL import Image

    if not path.is_file():
        raise ValueError(f"There is no image {str(path)!r}.")
    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # all of which Pillow raises
        raise ValueError(f"{path} is not a readable image: {error}") from error


def _seen(processor: Any, pixels: Any, image: Any) -> Any:
    """The picture after cropping, from the encoder's pixels; one that is cut into patches at once was not cropped."""
    import torch

    if pixels.dim() == 2:
        return image
    shown = (pixels[0, 0] if pixels.dim() == 5 else pixels[0]).float().cpu()
    mean, std = (torch.tensor(getattr(processor.image_processor, f"image_{what}")) for what in ("mean", "std"))
    return (shown * std[:, None, None] + mean[:, None, None]).clamp(0, 1).permute(1, 2, 0).numpy()
