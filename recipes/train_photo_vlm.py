"""Train a small LLaVA from a vision encoder and a language model that exist, on pictures put together from photographs.

    accelerate launch recipes/train_photo_vlm.py recipes/configs/photo_vlm.yaml

Such as DINOv2-small and SmolLM2-135M-Instruct, and CIFAR-10: captions, and yes/no questions. The encoder stays as it
is, so what it says of all pictures is computed once and kept in the output folder. First the projector alone learns to
turn a patch into the language model's own embedding of the class that it shows; then the projector and LoRA in the
language model learn from conversations. The output folder loads like any LLaVA, with LoRA merged:
`benchmarks/vlm_claims.py` measures it. The pictures are those of `patchattn.evaluation.tasks.collages`.
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recipe_common import PatchedTrainer, TrainingSettings, begin, command, finished, last_checkpoint, prepare, train
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    EvalPrediction,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from patchattn import option
from patchattn.evaluation.tasks import collages
from patchattn.evaluation.tasks.company import KINDS

IGNORED = -100  # what the loss passes over
EVAL_SEED = 1_000_003  # added to the seed, for pictures of other photographs
PROJECTOR = "multi_modal_projector"
IMAGE, START, END = "<image>", "<|im_start|>", "<|im_end|>"
ASKED, ANSWERING = f"{START}user\n", f"{END}\n{START}assistant\n"
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{{ '\n' }}{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class PhotoVLMSettings(TrainingSettings):
    """Train a small LLaVA from a vision encoder and a language model that exist."""

    tower: str = option(help="Folder or Hub id of a vision encoder with a class token, such as DINOv2-small.")
    language_model: str = option(help="Folder or Hub id of a causal language model with ChatML's marks, as SmolLM2's.")
    photos: str = option(help="Zip file of photographs to train on, as split/class/name.jpg.")
    eval_photos: str = option(help="Zip file of others, of the same classes, to evaluate on.")
    pixels: int = option(112, help="Side of a picture.", unit="pixels", minimum=2)
    pictures: int = option(2000, help="Different pictures to train on.", minimum=1)
    eval_pictures: int = option(48, help="Pictures of other photographs to evaluate on.", minimum=1)
    questions: int = option(6, help="Yes/no questions per picture, beside its caption.", minimum=1)
    align_steps: int = option(1500, help="Steps of the projector alone, before the language model.", minimum=1)
    align_batch: int = option(512, help="Patches per step of the projector alone.", minimum=1)
    align_learning_rate: float = option(1e-3, help="Peak, of the projector alone.", minimum=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lora_rank:
            raise ValueError("lora_rank must be at least 1: the language model learns by LoRA alone.")
        if self.variants:
            raise ValueError("variants: this recipe trains a plain model; patch what comes out.")
        train, evaluation = (collages.Photos(path).classes for path in (self.photos, self.eval_photos))
        if train != evaluation:
            raise ValueError(f"photos and eval_photos must show the same classes, got {train} and {evaluation}.")
        side = collages.CELLS * AutoConfig.from_pretrained(self.tower).patch_size
        if self.pixels % side:
            raise ValueError(f"pixels must be a multiple of {side}, {collages.CELLS} patches, got {self.pixels}.")


def make_processor(settings: PhotoVLMSettings) -> LlavaProcessor:
    """What makes tokens and pixel values of a prompt and a picture."""
    side = {"height": settings.pixels, "width": settings.pixels}
    return LlavaProcessor(
        image_processor=AutoImageProcessor.from_pretrained(settings.tower, size=side, do_center_crop=False),
        tokenizer=AutoTokenizer.from_pretrained(
            settings.language_model, extra_special_tokens={"image_token": IMAGE}, padding_side="left"
        ),
        patch_size=AutoConfig.from_pretrained(settings.tower).patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which the strategy drops again
        chat_template=TEMPLATE,
    )


def make_model(settings: PhotoVLMSettings, processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """The two models with a new projector between them; the encoder's places are those of our pictures' size."""
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    tower = AutoModel.from_pretrained(settings.tower, dtype=torch.float32).eval()
    patches, width = settings.pixels // tower.config.patch_size, tower.config.hidden_size
    with torch.no_grad():
        places = tower.embeddings.interpolate_pos_encoding(
            torch.zeros(1, patches**2 + 1, width), settings.pixels, settings.pixels
        )
    tower.embeddings.position_embeddings = nn.Parameter(places)
    tower.config.image_size = settings.pixels
    text = AutoModelForCausalLM.from_pretrained(settings.language_model, dtype=dtype)
    text.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text.config,
        image_token_index=processor.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=patches**2,
        tie_word_embeddings=text.config.tie_word_embeddings,
        pad_token_id=processor.tokenizer.pad_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
        bos_token_id=processor.tokenizer.bos_token_id,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower, model.model.language_model, model.lm_head = tower, text.model, text.lm_head
    model.generation_config = text.generation_config
    return model.requires_grad_(False)


class KnownFeatures(nn.Module):
    """In place of the encoder: what it would say of a picture is given instead of pixels, `(B, P + 1, C)`."""

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=pixel_values, hidden_states=(pixel_values,))


class Pictures(Dataset[dict[str, torch.Tensor]]):
    """Pictures with what the encoder says of them, each with a caption and yes/no questions about it.

    All answers of a picture stand in one row, and none of them sees another: each request begins behind the picture.
    So a row costs little more than the picture, and every request is read as if it were the only one.

    Args:
        settings: of the run.
        processor: of the model.
        features: `(N, P + 1, C)` of the pictures.
        evaluate: pictures of photographs that training never sees, and a question after something absent of each of
            POPE's kinds and three after what is there.
    """

    def __init__(
        self, settings: PhotoVLMSettings, processor: LlavaProcessor, features: torch.Tensor, *, evaluate: bool = False
    ) -> None:
        self.settings, self.features, self.evaluate = settings, features, evaluate
        self.photos, self.tokenizer = photographs(settings, evaluate=evaluate), processor.tokenizer
        self.prefix = self._ids(ASKED + IMAGE * (features.shape[1] - 1) + "\n")
        names = [collages.with_article(name) for name in self.photos.classes]
        longest = max((len(self._ids(collages.question(name))), name) for name in self.photos.classes)[1]
        self.slot = len(self._ids(collages.question(longest) + ANSWERING)) + 2
        count = 2 * len(KINDS) if evaluate else settings.questions
        caption = "There is " + ", ".join(names[: collages.CELLS**2 - 1]) + f" and {max(names, key=len)}."
        self.asks_caption = self._ids(collages.CAPTION_REQUEST + ANSWERING)
        self.caption = len(self._ids(caption)) + 4
        begin, places = len(self.prefix), []
        for _ in range(count):
            begin += self.slot
            places += [begin - 3, begin - 2]
        begin += len(self.asks_caption)
        places += range(begin - 1, begin + self.caption - 1)
        self.count, self.length = count, begin + self.caption
        self.keep = torch.tensor(places)  # where what comes next is an answer

    def __len__(self) -> int:
        return len(self.features)

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return found

    def questions(self, scene: collages.Scene, draw: np.random.Generator) -> list[tuple[str, bool]]:
        """Names and whether they are there."""
        if self.evaluate:
            return [(scene.absent(kind) if i % 2 else scene.present(), i % 2 == 0) for kind in KINDS for i in range(2)]
        absent = [name for name in self.photos.classes if name not in scene.objects]
        asked = []
        for _ in range(self.count):
            is_there = bool(draw.random() < 0.5)
            asked.append((str(draw.choice(list(scene.objects) if is_there else absent)), is_there))
        return asked

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`pixel_values` the features, `input_ids`, `attention_mask` `(1, T, T)`, `position_ids`, and `labels` of the
        places in `keep`."""
        scene = self.photos.scene(self.settings.seed + EVAL_SEED * self.evaluate, index)
        draw = np.random.default_rng((self.settings.seed, index, 4))
        first, pad = len(self.prefix), self.tokenizer.pad_token_id
        ids, labels = list(self.prefix), []
        places, sees = torch.arange(self.length), torch.eye(self.length, dtype=torch.bool)
        sees[:first, :first] = torch.ones(first, first).tril().bool()

        def turn(tokens: list[int], begin: int) -> None:
            end = begin + len(tokens)
            sees[begin:end, :first] = True
            sees[begin:end, begin:end] = torch.ones(len(tokens), len(tokens)).tril().bool()
            places[begin:end] = torch.arange(first, first + len(tokens))

        for name, is_there in self.questions(scene, draw):
            answer = self._ids(("Yes" if is_there else "No") + END)
            tokens = self._ids(collages.question(name) + ANSWERING) + answer
            ids += [pad] * (self.slot - len(tokens)) + tokens
            turn(tokens, len(ids) - len(tokens))
            labels += answer
        answer = self._ids(scene.caption() + END)[: self.caption]
        turn(self.asks_caption + answer, len(ids))
        ids += self.asks_caption + answer + [pad] * (self.caption - len(answer))
        labels += answer + [IGNORED] * (self.caption - len(answer))
        return {
            "pixel_values": self.features[index].float(),
            "input_ids": torch.tensor(ids),
            "attention_mask": sees[None],
            "position_ids": places,
            "labels": torch.tensor(labels),
        }


def photographs(settings: PhotoVLMSettings, *, evaluate: bool) -> collages.Photos:
    """Those that pictures are made of."""
    return collages.Photos(settings.eval_photos if evaluate else settings.photos)


def known_features(
    tower: nn.Module, processor: LlavaProcessor, settings: PhotoVLMSettings, *, evaluate: bool = False
) -> torch.Tensor:
    """`(N, P + 1, C)` float16: what the encoder says of the pictures, from the output folder if it is there."""
    file = Path(settings.output) / f"{'eval' if evaluate else 'train'}_features.safetensors"
    if file.is_file():
        return load_file(file)["features"]
    photos, count = photographs(settings, evaluate=evaluate), settings.eval_pictures if evaluate else settings.pictures
    seed, parts = settings.seed + EVAL_SEED * evaluate, []
    for start in track(range(0, count, 16), description="Pictures", disable=not sys.stderr.isatty()):
        shown = [photos.scene(seed, index).picture(settings.pixels) for index in range(start, min(start + 16, count))]
        pixels = processor.image_processor(shown, return_tensors="pt").pixel_values
        with torch.inference_mode():
            parts.append(tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-1].half())
    features = torch.cat(parts)
    save_file({"features": features}, file)
    return features


def patch_classes(settings: PhotoVLMSettings, count: int, side: int, *, evaluate: bool = False) -> torch.Tensor:
    """`(N, side ** 2)` number of the class that a patch shows, -1 for none."""
    photos = photographs(settings, evaluate=evaluate)
    found = torch.full((count, side, side), -1)
    cell = side // collages.CELLS
    for index in range(count):
        scene = photos.scene(settings.seed + EVAL_SEED * evaluate, index)
        for name, place in zip(scene.objects, scene.cells, strict=True):
            row, column = place // collages.CELLS * cell, place % collages.CELLS * cell
            found[index, row : row + cell, column : column + cell] = photos.classes.index(name)
    return found.flatten(1)


def align(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, settings: PhotoVLMSettings, data: list[Pictures]
) -> float:
    """Teach the projector to turn a patch into the mean embedding of its class's name, zero where nothing is shown.

    Returns:
        Share of the patches of photographs that training never sees whose nearest class is right.
    """
    projector, table = model.model.multi_modal_projector, model.get_input_embeddings().weight.float()
    names = [processor.tokenizer(f" {name}", add_special_tokens=False).input_ids for name in data[0].photos.classes]
    wanted = torch.stack([table[ids].mean(0) for ids in names])
    wanted = torch.cat([wanted, torch.zeros_like(wanted[:1])])  # the last, -1, is none of them
    inputs = data[0].features[:, 1:].flatten(0, 1)
    side = settings.pixels // model.config.vision_config.patch_size
    classes = patch_classes(settings, len(data[0]), side).flatten()
    with torch.no_grad():  # the first layer begins on standardised features
        sample = inputs[:: max(len(inputs) // 20_000, 1)].float()
        nn.init.normal_(projector.linear_1.weight, std=sample.shape[1] ** -0.5)
        projector.linear_1.weight /= sample.std(0).clamp(min=1e-3)
        projector.linear_1.bias.copy_(-projector.linear_1.weight @ sample.mean(0))
    projector.requires_grad_(True)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=settings.align_learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.align_learning_rate, total_steps=settings.align_steps, pct_start=0.1
    )
    unit = wanted[:-1].square().sum(-1).mean()
    for _ in track(range(settings.align_steps), description="Projector", disable=not sys.stderr.isatty()):
        rows = torch.randint(len(inputs), (settings.align_batch,))
        error = projector(inputs[rows].float()) - wanted[classes[rows]]
        loss = error.square().sum(-1).mean() / unit
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    truth = patch_classes(settings, len(data[1]), side, evaluate=True)
    with torch.no_grad():
        found = torch.cdist(projector(data[1].features[:, 1:].float()), wanted[:-1]).argmin(-1)
    return float((found == truth)[truth >= 0].float().mean())


def likeliest(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The likeliest token at each place `(B, n)`: all that the scores need of the logits."""
    return logits.argmax(-1)


def scores(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the questions answered right, and of the captions' tokens."""
    right = prediction.predictions == prediction.label_ids
    answers = 4 * len(KINDS)  # two tokens each
    is_caption = prediction.label_ids[:, answers:] != IGNORED
    return {
        "accuracy": float(right[:, :answers:2].mean()),
        "caption_tokens": float(right[:, answers:][is_caption].mean()),
    }


class AnswersTrainer(PatchedTrainer):
    """A trainer whose loss is that of the answers alone, and which writes the whole model with LoRA merged."""

    tower: nn.Module

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over all tokens of answers."""
        given = {name: value for name, value in inputs.items() if name != "labels"}
        data = self.train_dataset if model.training else self.eval_dataset
        logits = model(**given, logits_to_keep=data.keep.to(given["input_ids"].device)).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), inputs["labels"].flatten())
        return (loss, {"logits": logits}) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if output_dir is None or Path(output_dir).name.startswith(PREFIX_CHECKPOINT_DIR):
            super()._save(output_dir, state_dict)
            return
        whole = copy.deepcopy(self.accelerator.unwrap_model(self.model)).float().merge_and_unload()
        whole.model.vision_tower = self.tower
        whole.save_pretrained(output_dir)
        self.processing_class.save_pretrained(output_dir)


def run(settings: PhotoVLMSettings) -> dict[str, Any]:
    """Train and evaluate, or continue a run that was interrupted; returns what `metrics.json` holds."""
    if (done := finished(settings)) is not None:
        return done
    arguments = begin(settings)
    processor = make_processor(settings)
    model = make_model(settings, processor)
    tower, model.model.vision_tower = model.model.vision_tower, KnownFeatures()
    data = []
    for evaluate in (False, True):
        features = known_features(tower, processor, settings, evaluate=evaluate)
        data.append(Pictures(settings, processor, features, evaluate=evaluate))
    is_new = last_checkpoint(settings.output) is None  # a checkpoint brings its projector along
    aligned = align(model, processor, settings, data) if is_new else None
    trainer = AnswersTrainer.of(
        prepare(model, settings, heads=[PROJECTOR]),
        settings,
        arguments,
        mean_loss=True,
        train_dataset=data[0],
        eval_dataset=data[1],
        compute_metrics=scores,
        preprocess_logits_for_metrics=likeliest,
        processing_class=processor,  # saved with the model
    )
    trainer.tower = tower
    return train(trainer, settings, patches_named=aligned)


if __name__ == "__main__":
    command(PhotoVLMSettings, run)
