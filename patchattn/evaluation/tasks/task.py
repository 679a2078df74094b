"""What a task is to `patchattn eval`: samples, answers to batches of them, and scores of the answers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .prefixes import Prefixes

Row = dict[str, Any]
ModelKind = Literal["causal_lm", "classifier", "vision_language"]


class EvalTask(ABC):
    """One benchmark task. Building one reads and checks its data, so that mistakes show before a model is loaded.

    The runner cuts the samples into batches, the same ones however many processes share them, and keeps every answer
    as a line of JSON; `score` sees all answers in the order of the samples.

    Attributes:
        name: as on the command line, such as `glue/sst2` or `needle`.
        kind: what a model must be.
        main_score: the entry of `score` that stands for the task in tables.
        unit: of the main score, empty for a number without one, such as a perplexity.
        higher_is_better: whether more of it is better.
        samples_are_draws: whether samples are draws of one kind, such as questions, so that an error can be stated.
        generates: whether answers are generated; a patch that acts behind a prompt alone changes nothing of others.
        prefixes: where tasks that generate find what the unpatched model has read of their prompts; None: every prompt
            is read as a whole.
    """

    name: str
    kind: ClassVar[ModelKind] = "causal_lm"
    main_score: str
    unit: str = "%"
    higher_is_better: bool = True
    samples_are_draws: ClassVar[bool] = True
    generates: ClassVar[bool] = False
    prefixes: "Prefixes | None" = None

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """What must be equal for a killed run to be continued: settings and a digest of the samples, JSON alone."""

    def check_model(self, model: Any, tokenizer: Any) -> None:  # noqa: B027 - most tasks take any model
        """Refuse a model that cannot take this task, before its first sample.

        Raises:
            ValueError: why, and what to do.
        """

    @abstractmethod
    def answer(self, model: Any, tokenizer: Any, indices: Sequence[int]) -> list[Row]:
        """Answers to one batch, a JSON-able row per sample.

        Rows may hold costs that the report shows beside the score: `prompt_tokens` and `new_tokens` of the sample,
        and what the batch it was in cost, `evaluation.tasks.cost.Cost.row()`. What is missing is not shown. Random
        numbers are seeded per batch by the runner.

        Args:
            model: in evaluation mode, patched or not.
            tokenizer: of the model; a processor for vision-language models.
            indices: of the samples.
        """

    @abstractmethod
    def score(self, rows: Sequence[Row]) -> dict[str, float]:
        """Scores by name from the answers to all samples, in their order; accuracies and the like from 0 to 100."""

    def values(self, rows: Sequence[Row]) -> list[float] | None:
        """What the main score is the mean of, a value per sample; None where it is no such mean."""
        return None

    def figure(self, rows: Mapping[str, Sequence[Row]]) -> "Figure | None":
        """A picture of what the scores do not show, for the report; most tasks have none.

        Args:
            rows: name of each run to its answers to all samples, in their order.
        """
        return None
