"""Train a tiny LLaVA from scratch on generated pictures of coloured shapes: captions, and yes/no questions.

    accelerate launch recipes/train_tiny_vlm.py recipes/configs/tiny_vlm.yaml

A CLIP vision tower with a class token, a projector and a Llama, all from configurations, with a word tokenizer and a
processor of their own. As in LLaVA the tower comes first: its class token learns which objects a picture shows, which
is what CLIP's learns from captions; then the tower is frozen and the rest learns to talk about its patches. The output
folder loads like any LLaVA, with `LlavaForConditionalGeneration.from_pretrained` and `AutoProcessor.from_pretrained`;
`benchmarks/hallucination.py` measures it. The pictures are those of `patchattn.evaluation.tasks.shapes`. The
configuration is checked before a model is made.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from recipe_common import PatchedTrainer, TrainingSettings, begin, command, finished, last_checkpoint, prepare, train
from torch import nn
from torch.utils.data import Dataset
from transformers import EvalPrediction, LlavaProcessor

from patchattn import option
from patchattn.demo.tiny_vlm import TinyVLMSizes, make_model, make_processor
from patchattn.evaluation.tasks import shapes

IGNORED = -100  # what the loss passes over
EVAL_SEED = 1_000_003  # added to the seed: pictures that training never sees


@dataclass(frozen=True, kw_only=True)
class TinyVLMSettings(TinyVLMSizes, TrainingSettings):
    """Train a tiny vision-language model from scratch on generated pictures."""

    pictures: int = option(20_000, help="Different pictures to train on.", minimum=1)
    eval_pictures: int = option(300, help="Other pictures, each with six questions, to evaluate on.", minimum=1)
    questions: int = option(
        4, help="Yes/no questions per picture; every second has a caption too.", minimum=1, maximum=8
    )
    vision_steps: int = option(800, help="Optimizer steps of the vision tower alone, before the rest.", minimum=1)
    vision_batch: int = option(32, help="Pictures per step of the vision tower alone.", minimum=1)
    vision_learning_rate: float = option(1e-3, help="Peak, of the vision tower alone.", minimum=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_rank:
            raise ValueError("lora_rank goes with a pretrained model; this one is trained in full.")


def pixel_values(processor: LlavaProcessor, pictures: Iterable[shapes.Scene]) -> torch.Tensor:
    """The pictures as the vision tower gets them, `(B, 3, side, side)`."""
    return processor.image_processor([scene.picture() for scene in pictures], return_tensors="pt").pixel_values


def train_vision(tower: nn.Module, processor: LlavaProcessor, settings: TinyVLMSettings) -> float:
    """Teach the class token which objects a picture shows, by a linear layer that is not kept.

    Returns:
        Share of the evaluation pictures of which it names all objects and no other.
    """
    head = nn.Linear(settings.vision_width, len(shapes.OBJECTS))
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.vision_learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.vision_learning_rate, total_steps=settings.vision_steps, pct_start=0.1
    )

    def logits(scenes: list[shapes.Scene]) -> torch.Tensor:
        return head(tower(pixel_values=pixel_values(processor, scenes)).pooler_output)

    def shown(scenes: list[shapes.Scene]) -> torch.Tensor:
        return torch.tensor([[name in scene.objects for name in shapes.OBJECTS] for scene in scenes])

    for step in range(settings.vision_steps):
        numbers = range(step * settings.vision_batch, (step + 1) * settings.vision_batch)
        scenes = [shapes.scene(settings.seed, number % settings.pictures) for number in numbers]
        loss = nn.functional.binary_cross_entropy_with_logits(logits(scenes), shown(scenes).float())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    held_out = list(shapes.scenes(settings.seed + EVAL_SEED, settings.eval_pictures))
    with torch.inference_mode():
        return float(((logits(held_out) > 0) == shown(held_out)).all(-1).float().mean())


def turn(request: str, first: bool) -> str:
    """What stands before an answer; the picture comes with the first request."""
    return f"USER: {'<image>' if first else ''}\n{request} ASSISTANT:"


def questions(scene: shapes.Scene, count: int, draw: np.random.Generator) -> list[tuple[str, str]]:
    """Yes/no questions with answers, both as likely; those answered by no ask for anything that is absent.

    Half of them ask for a colour or a shape alone: what they teach comes quickly, and without them the model answers
    questions after whole objects by chance for most of its training.
    """
    asked = []
    for _ in range(count):
        part = draw.choice([None, None, 0, 1])  # the colour or the shape of an object, the first or the second word
        known = shapes.OBJECTS if part is None else sorted({name.split()[part] for name in shapes.OBJECTS})
        shown = set(scene.objects) if part is None else {name.split()[part] for name in scene.objects}
        absent = [name for name in known if name not in shown]
        is_there = not absent or bool(draw.random() < 0.5)
        names = sorted(shown) if is_there else absent
        name = names[int(draw.integers(len(names)))]
        text = f"Is there something {name} in the image?" if part == 0 else shapes.question(name)
        asked.append((text, "yes" if is_there else "no"))
    return asked


class Conversations(Dataset[dict[str, torch.Tensor]]):
    """Conversations about generated pictures, padded on the right to one length.

    Args:
        settings: of the run.
        processor: of the model.
        evaluate: one question each after pictures that training never sees, six per picture: present and absent, of
            each of POPE's kinds. Otherwise several questions about each picture and, for every second one, a caption
            among them.
    """

    def __init__(self, settings: TinyVLMSettings, processor: LlavaProcessor, *, evaluate: bool = False) -> None:
        self.settings, self.processor = settings, processor
        self.evaluate = evaluate
        self.seed = settings.seed + EVAL_SEED * evaluate
        caption = 0 if evaluate else 12 + 4 * shapes.MOST_OBJECTS
        self.length = settings.patches + 16 * (1 if evaluate else settings.questions) + caption

    def __len__(self) -> int:
        if self.evaluate:
            return 2 * len(shapes.KINDS) * self.settings.eval_pictures
        return self.settings.pictures

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`pixel_values` `(3, side, side)`, and `input_ids`, `attention_mask` and `labels` of one length."""
        if self.evaluate:
            number, which = divmod(index, 2 * len(shapes.KINDS))
            scene = shapes.scene(self.seed, number)
            name = scene.present() if which % 2 else scene.absent(shapes.KINDS[which // 2])
            turns = [(shapes.question(name), "yes" if which % 2 else "no")]
        else:
            scene = shapes.scene(self.seed, index)
            draw = np.random.default_rng((self.seed, index, 4))
            turns = questions(scene, self.settings.questions, draw)
            if index % 2:
                turns.append((shapes.CAPTION_REQUEST, scene.caption()))
            turns = [turns[int(place)] for place in draw.permutation(len(turns))]
        return {"pixel_values": pixel_values(self.processor, [scene])[0], **self._tokens(turns)}

    def _tokens(self, turns: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        before = [turn(request, first=number == 0) for number, (request, _) in enumerate(turns)]
        before[0] = before[0].replace("<image>", "<image>" * self.settings.patches)
        pieces = tokenizer([*before, *(said for _, said in turns)], add_special_tokens=False).input_ids
        ids, labels = [tokenizer.bos_token_id], [IGNORED]
        for asked, said in zip(pieces[: len(turns)], pieces[len(turns) :], strict=True):
            answered = [*said, tokenizer.eos_token_id]
            ids += asked + answered
            labels += [IGNORED] * len(asked) + ([*said[:1], IGNORED] if self.evaluate else answered)
        rest = self.length - len(ids)
        return {
            "input_ids": torch.tensor(ids + [tokenizer.pad_token_id] * rest),
            "attention_mask": torch.tensor([1] * len(ids) + [0] * rest),
            "labels": torch.tensor(labels + [IGNORED] * rest),
        }


def best_words(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The likeliest token at each position `(B, T)`: all that the accuracy needs of the logits."""
    return logits.argmax(-1)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the questions whose likeliest answer is right; the words are those one position before the labels."""
    labels = prediction.label_ids[:, 1:]
    asked = labels != IGNORED
    return {"accuracy": float(np.mean(prediction.predictions[:, :-1][asked] == labels[asked]))}


class LogitsTrainer(PatchedTrainer):
    """A trainer that evaluates on logits alone; a LLaVA gives its kv cache and what its vision encoder says too."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss; and, if outputs are asked for, the logits."""
        computed = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not return_outputs:
            return computed
        loss, outputs = computed
        return loss, {"logits": outputs["logits"]}


def run(settings: TinyVLMSettings) -> dict[str, Any]:
    """Train and evaluate, or continue a run that was interrupted; returns what `metrics.json` holds."""
    if (done := finished(settings)) is not None:
        return done
    processor = make_processor(settings)
    arguments = begin(settings)
    model = make_model(settings, processor.tokenizer)
    tower = model.model.vision_tower
    is_new = last_checkpoint(settings.output) is None  # a checkpoint brings its tower along
    exact = train_vision(tower, processor, settings) if is_new else None
    tower.requires_grad_(False)
    model = prepare(model, settings)
    trainer = LogitsTrainer.of(
        model,
        settings,
        arguments,
        train_dataset=Conversations(settings, processor),
        eval_dataset=Conversations(settings, processor, evaluate=True),
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=best_words,
        processing_class=processor,  # saved with the model
    )
    return train(trainer, settings, class_token_exact=exact)


if __name__ == "__main__":
    command(TinyVLMSettings, run)
