"""The official metrics of GLUE's tasks (arXiv 1804.07461, Table 1) as a module of the `evaluate` library.

    Glue("mrpc").compute(predictions=[0, 1], references=[0, 1])  # {'accuracy': 1.0, 'f1': 1.0}

`evaluate.load(path_of_this_file, "mrpc")` gives the same object; nothing is fetched for it. That is why this file
stands alone: `evaluate` copies it.
"""

from collections.abc import Callable
from typing import Any

try:
    import datasets
    import evaluate
    import numpy as np
    from scipy import stats
    from sklearn import metrics
except ImportError as error:
    raise ImportError(f'The metrics of GLUE need {error.name}: pip install "patchattn[eval]"') from error

Scores = dict[str, float]


def accuracy(predictions: np.ndarray, references: np.ndarray) -> Scores:
    """Share of equal labels."""
    return {"accuracy": float(metrics.accuracy_score(references, predictions))}


def accuracy_and_f1(predictions: np.ndarray, references: np.ndarray) -> Scores:
    """Beside the accuracy F1 of label 1; 0 if that is neither predicted nor right anywhere."""
    f1 = metrics.f1_score(references, predictions, zero_division=0.0)
    return {**accuracy(predictions, references), "f1": float(f1)}


def matthews(predictions: np.ndarray, references: np.ndarray) -> Scores:
    """Matthews' correlation; 0 if the predictions or the references are constant."""
    return {"matthews_correlation": float(metrics.matthews_corrcoef(references, predictions))}


def correlations(predictions: np.ndarray, references: np.ndarray) -> Scores:
    """Pearson's and Spearman's correlation; NaN if the predictions or the references are constant."""
    return {
        "pearson": float(stats.pearsonr(predictions, references)[0]),
        "spearmanr": float(stats.spearmanr(predictions, references)[0]),
    }


GLUE_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], Scores]] = {
    "cola": matthews,
    "sst2": accuracy,
    "mrpc": accuracy_and_f1,
    "stsb": correlations,
    "qqp": accuracy_and_f1,
    "mnli": accuracy,
    "qnli": accuracy,
    "rte": accuracy,
    "wnli": accuracy,
}


class Glue(evaluate.Metric):
    """The official metric of one GLUE task.

    Args:
        config_name: the task, such as `mrpc`.
        kwargs: of `evaluate.Metric`, such as `keep_in_memory`.

    Raises:
        ValueError: no such task.
    """

    def __init__(self, config_name: str | None = None, **kwargs: Any) -> None:
        if config_name not in GLUE_METRICS:
            raise ValueError(f"Glue needs the name of a task, one of {', '.join(GLUE_METRICS)}, got {config_name!r}.")
        super().__init__(config_name=config_name, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        value = datasets.Value("float32" if self.config_name == "stsb" else "int64")
        return evaluate.MetricInfo(
            description="The official metrics of the tasks of GLUE.",
            citation="Wang et al.: GLUE. A Multi-Task Benchmark and Analysis Platform, 2018.",
            inputs_description="predictions and references: labels, or scores from 0 to 5 for stsb.",
            features=datasets.Features({"predictions": value, "references": value}),
            reference_urls=["https://arxiv.org/abs/1804.07461"],
            format="numpy",
        )

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> Scores:
        return GLUE_METRICS[self.config_name](predictions, references)
