"""The commands `patchattn calibrate head-roles`, `lookback` and `vectors`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .calibrate import BatchSize, Device, Length, Model, Modules, Samples, bar

Plot = Annotated[Path | None, typer.Option(help="Draw a heat map into this file, such as heads.png.")]
Seed = Annotated[int, typer.Option(help="Seed of the prompts.", min=0)]


def calibrate_head_roles(
    model: Model,
    role: Annotated[
        str, typer.Option(help="What to score: position, rarity, gradient, temporal, codes, relation or salience.")
    ],
    data: Annotated[
        Path,
        typer.Option(
            help="Texts: .txt, .jsonl or .tsv; for temporal .jsonl or .tsv with prompt, answer and perhaps without, "
            "the same prompt without its date; for codes with prompt and without, the same without the task; for "
            "relation with source and target, for salience with source."
        ),
    ],
    offset: Annotated[int, typer.Option(help="With position: the distance, -1 for the token before.")] = -1,
    rank: Annotated[
        int, typer.Option(help="With relation: the target must be among so many tokens that the head promotes.", min=1)
    ] = 10,
    suppress: Annotated[
        bool, typer.Option("--suppress", help="With relation: heads that hold the target down.")
    ] = False,
    top: Annotated[
        int | None, typer.Option(help="Write a list of so many heads, of the highest scores.", min=1)
    ] = None,
    output: Annotated[Path, typer.Option("--output", "--out", help="Where to write the scores, or the list.")] = Path(
        "head_roles.json"
    ),
    plot: Plot = None,
    modules: Modules = None,
    samples: Samples = None,
    length: Length = 512,
    batch_size: BatchSize = 8,
    device: Device = None,
) -> None:
    """Score what every head of a model does.

    position: attends most to the token at --offset; rarity: attends to rare tokens; gradient: takes part in knowing the
    texts by heart, by gradients of its weights; temporal: the answer needs it, more so where the prompt has a date;
    codes: gives other things at prompts with a task than without it, by an autoencoder's codes; relation: its weights
    alone lead from each pair's source to its target, and salience: write much where it attends to a source (MAPS).
    `patch_model(model, "heads", heads=OUTPUT)` masks a list of heads.
    """
    from ..calibration.data import make_batches, read_texts
    from ..calibration.few_shot import first_answer_token, prompt_batches
    from ..calibration.records import read_records
    from ..files.documents import write_json
    from ..inspection import head_codes, head_functions, head_roles
    from .common import language_model

    scorers: dict[str, Any] = {
        "position": head_roles.position_scores,
        "rarity": head_roles.rarity_scores,
        "gradient": head_roles.gradient_scores,
    }
    fields = {
        "temporal": (("prompt", "answer"), ("without",)),
        "codes": (("prompt", "without"), ("answer",)),
        "relation": (("source", "target"), ()),
        "salience": (("source",), ("target",)),
    }
    if role not in (*scorers, *fields):
        raise ValueError(f"--role is one of {', '.join((*scorers, *fields))}; got {role!r}.")
    if role != "relation" and (rank != 10 or suppress):
        raise ValueError(f"--rank and --suppress are of the role relation, got {role}.")
    if offset != -1 and role != "position":
        raise ValueError(f"--offset is of the role position, got {role}.")
    records = read_records(data, *fields[role]) if role in fields else []
    texts = [] if role in fields else read_texts(data)
    tokenizer, loaded = language_model(model, device)
    if role in ("relation", "salience"):
        names = fields[role][0]
        ids = [[tokenizer(each[name], add_special_tokens=False)["input_ids"] for name in names] for each in records]
        words = [[one[0] for one in each] for each in ids if all(len(one) == 1 for one in each)][:samples]
        if not words:
            raise ValueError(
                f"{data}: no {' and '.join(names)} is a single token, such as a word with the blank in front of it."
            )
        if role == "relation":
            pairs = [(one, other) for one, other in words]
            found = head_functions.relation_scores(loaded, pairs, top=rank, suppress=suppress, modules=modules)
        else:
            found = head_functions.relation_salience(loaded, [word for (word,) in words], modules=modules)
    elif role == "codes":
        given = [
            [batch.inputs for batch in prompt_batches(tokenizer, some, [0] * len(some), batch_size)]
            for some in ([record[name] for record in records[:samples]] for name in ("prompt", "without"))
        ]
        found = head_codes.code_scores(loaded, *given, modules=modules)
    elif role == "temporal":
        records = records[:samples]
        dated = [bool(record["without"]) for record in records]
        if any(dated) and not all(dated):
            raise ValueError(f"{data}: all prompts have a form without their date, or none has.")

        def scores(field: str) -> Any:
            prompts = [record[field] for record in records]
            answers = [
                first_answer_token(tokenizer, prompt, record["answer"])
                for prompt, record in zip(prompts, records, strict=True)
            ]
            made = prompt_batches(tokenizer, prompts, answers, batch_size)
            given = [batch.inputs for batch in made]
            return head_roles.ablation_scores(loaded, given, [batch.answers for batch in made], modules=modules)

        found = scores("prompt")
        if any(dated):
            found = head_roles.minus(found, scores("without"), "temporal")
    else:
        how: dict[str, Any] = {"length": length, "batch_size": batch_size, "samples": samples}
        batches = [
            {name: batch[name] for name in ("input_ids", "attention_mask")}
            for batch in make_batches(tokenizer, texts, "none", **how)
        ]
        more = {"offset": offset} if role == "position" else {}
        found = scorers[role](loaded, batches, modules=modules, **more)
    if top is None:
        found.save(output)
    else:
        about = {"method": found.method, **found.settings}
        write_json(output, {**found.highest(top).to_dict(), "calibration": about})
    console = Console(highlight=False)
    best = max((score, name, head) for name, of in found.scores.items() for head, score in enumerate(of))
    chance = f", by chance {found.settings['chance']:.3f}" if "chance" in found.settings else ""
    chance += f", of {found.settings['pairs']} pairs of single tokens" if role == "relation" else ""
    console.print(
        f"Highest {found.method} score: {best[0]:.3f}, head {best[2]} of {best[1]}{chance}. Wrote {output}",
        soft_wrap=True,
    )
    _draw(console, found, plot, f"{found.method.capitalize()} heads: {found.base}", f"{found.method} score")


def calibrate_lookback(
    model: Model,
    data: Annotated[
        Path,
        typer.Option(
            help="Answers: .jsonl or .tsv with context, answer and label (1: it keeps to its context, or 0), and "
            "perhaps before and between, which are the prompt's text around the context."
        ),
    ],
    window: Annotated[
        int | None, typer.Option(help="Tokens that ratios are averaged over; of a whole answer by default.", min=1)
    ] = None,
    folds: Annotated[int, typer.Option(help="Parts, by context, that the probe is tried on; 0: none.", min=0)] = 5,
    output: Annotated[Path, typer.Option("--output", "--out", help="Where to write the probe.")] = Path(
        "lookback.json"
    ),
    plot: Annotated[Path | None, typer.Option(help="Draw the weights of all heads into this file.")] = None,
    modules: Modules = None,
    batch_size: BatchSize = 8,
    device: Device = None,
) -> None:
    """Fit a Lookback Lens: whether an answer keeps to its context, by how much each head attends to that.

    `LookbackProbe.load(OUTPUT)` judges other answers, and guides decoding.
    """
    from ..calibration.lookback import lookback_features, out_of_fold, read_answers
    from ..inspection.lookback import LookbackProbe
    from .common import language_model

    answers = read_answers(data)
    contexts = len({each.context for each in answers})
    if folds == 1 or folds > contexts:
        raise ValueError(f"--folds is 0, or from 2 to the number of contexts, {contexts}; got {folds}.")
    tokenizer, loaded = language_model(model, device)
    console, how = Console(highlight=False), {"batch_size": batch_size, "modules": modules}
    with bar(console, "answers", len(answers)) as move:
        rows = lookback_features(loaded, tokenizer, answers, window=window, progress=move, **how)  # type: ignore[arg-type]
    about: dict[str, Any] = {"answers": len(answers), "window": window}
    told = f"{len(rows.labels)} rows of {len(answers)} answers"
    if folds:
        from sklearn.metrics import roc_auc_score

        scores = out_of_fold(loaded, rows.features, rows.labels, rows.contexts, folds=folds, modules=modules)
        about |= {"folds": folds, "auroc": float(roc_auc_score(rows.labels, scores))}
        told += f", AUROC {about['auroc']:.3f} on contexts that it was not fitted on"
    probe = LookbackProbe.fit(loaded, rows.features, rows.labels, modules=modules)
    probe.save(output, **about)
    console.print(f"{told}. Wrote {output}", soft_wrap=True)
    if plot is not None:
        from ..plotting import plot_lookback_probe

        _write(console, plot_lookback_probe(probe), plot)


def calibrate_vectors(
    model: Model,
    data: Annotated[Path, typer.Option(help="Pairs: .jsonl or .tsv with question and answer.")],
    kind: Annotated[str, typer.Option(help="Kind of vector: task or function.")] = "task",
    layer: Annotated[
        list[int] | None, typer.Option(help="Layer to try, from 0; may be repeated. All by default.", min=0)
    ] = None,
    shots: Annotated[int, typer.Option(help="Demonstrations of a prompt.", min=1)] = 10,
    prompts: Annotated[int, typer.Option(help="Prompts that means are taken over.", min=1)] = 100,
    trials: Annotated[
        int, typer.Option(help="With function: prompts that effects of heads are measured on.", min=1)
    ] = 25,
    heads: Annotated[int, typer.Option(help="With function: how many heads.", min=1)] = 10,
    output: Annotated[Path, typer.Option("--output", "--out", help="Where to write the vector.")] = Path(
        "vectors.json"
    ),
    scores: Annotated[Path | None, typer.Option(help="With function: write the effects of all heads here.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw how well each layer does; with function, the effects of all heads.")
    ] = None,
    modules: Modules = None,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    device: Device = None,
) -> None:
    """Find the vector of a task out of demonstrations, and the layer at which it does best.

    `patch_model(model, "task_vectors", vectors=OUTPUT)`, or "function_vectors", then makes the model do the task
    without them. Three in ten of the pairs are in no demonstration: the layer is chosen on them.
    """
    from ..calibration.records import read_records
    from ..calibration.vectors import find_vectors
    from .common import language_model

    if kind not in ("task", "function"):
        raise ValueError(f"--kind is task or function, got {kind!r}.")
    if kind == "task" and scores is not None:
        raise ValueError("--scores are effects of heads, which --kind function measures.")
    pairs = [(record["question"], record["answer"]) for record in read_records(data, ("question", "answer"))]
    tokenizer, loaded = language_model(model, device)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    console = Console(highlight=False)
    about: dict[str, Any] = {"kind": kind, "shots": shots, "count": prompts, "seed": seed}
    if kind == "function":
        about |= {"trials": trials, "heads": heads}
    with bar(console, "layers", None) as move:
        found = find_vectors(
            loaded, tokenizer, pairs, **about, layers=layer, batch_size=batch_size, modules=modules, progress=move
        )
    by_layer = {str(each): accuracy for each, accuracy in found.accuracy.items()}
    found.vectors.save(output, **about, accuracy=by_layer, without=found.without)
    console.print(
        f"Behind layer {found.layer} {100 * found.accuracy[found.layer]:.1f} % of first answer tokens are right, "
        f"without a vector {100 * found.without:.1f} %. Wrote {output}",
        soft_wrap=True,
    )
    if found.effects is not None and scores is not None:
        found.effects.save(scores)
    if found.effects is not None:
        _draw(console, found.effects, plot, f"Indirect effects: {found.vectors.base}", "indirect effect")
    elif plot is not None:
        from ..plotting import plot_vector_layers

        _write(console, plot_vector_layers(found.accuracy, found.without, title=f"Vectors: {found.vectors.base}"), plot)


def _draw(console: Console, scores: Any, plot: Path | None, title: str, label: str) -> None:
    if plot is not None:
        from ..plotting import plot_head_importance

        _write(console, plot_head_importance(scores, title=title, label=label), plot)


def _write(console: Console, figure: Any, path: Path) -> None:
    figure.savefig(path)
    console.print(f"Wrote {path}", soft_wrap=True)
