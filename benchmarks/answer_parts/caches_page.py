"""The page on variants that drop keys of the kv cache."""

from pathlib import Path

from .cases import CONTINUATION, LONGBENCH, NEEDLES
from .pictures import plot
from .tables import (
    HOW_CLAIMS_ARE_JUDGED,
    Rows,
    Setting,
    better,
    claims_table,
    lengths,
    losses_table,
    near,
    needles_table,
    of,
    settings,
    so_far,
)

WHENS = {"with": "Compressed with the question in sight", "before": "Compressed before the question comes"}
BASELINE, STREAMING = "random keys", "streaming_llm"
GROUPS = {
    "by attention": ("snapkv", "pyramidkv", "adakv", "expected_attention", "tova", "h2o"),
    "by keys, place, channels": (
        "knorm",
        "keydiff",
        "think",
        STREAMING,
        "duo (random gates)",
        "duo (learned gates)",
    ),
}
METHODS = (*GROUPS["by attention"], *GROUPS["by keys, place, channels"], BASELINE)
INTRODUCTION = """\
Every prompt was taken by the dense model and by each method; differences are of pairs, with their standard errors. \
Answers are forced: the columns of tasks are the share of prompts in which every token of the answer is the most \
likely one, so that greedy decoding writes it; nats are the answer's mean loss a token (all tasks), the lower the \
better. `kept` is the share of the numbers of keys and values that are stored when all has been read. The baseline, \
`random keys`, keeps the last 32 keys and others that are drawn.

A cache is compressed once, at the end of the prompt with the question in it, or before its question, which then \
comes behind the compressed cache; `h2o` and `tova` drop keys at every call, as published. `streaming_llm` and `duo` \
hide keys by place, so that when the question comes does not matter; they were asked once, and act in the prompt as \
well. `think` drops channels of keys and leaves values whole, so that half of the cache is its floor: it was asked \
for 80, 70 and 55 %. `a_vl` is for models that see images and is not here. All other methods go on from one dense \
prefill of a prompt."""
CLAIMS = {
    "snapkv": "What the end of a prompt attends to is what matters",
    "pyramidkv": "Lower layers need more keys than higher ones",
    "adakv": "Heads need different numbers of keys",
    "expected_attention": "Expected queries tell which keys matter",
    "tova": "What the last token attends to is what matters",
    "h2o": "What has received most attention is what matters",
    "knorm": "Keys of small norm matter",
    "keydiff": "Keys unlike the others matter",
    "think": "40 % of the channels of keys can go",
    "streaming_llm": "The first keys and the last ones are enough",
}


def lines(rows: Rows, conditions: str, output: Path, folder: Path) -> list[str]:
    """The page from the rows that are there, and its pictures beside it."""
    needles = of(rows, NEEDLES)
    page = ["# Caches that forget: what answers lose", "", conditions, ""]
    page += ["`python benchmarks/answers.py run caches DIR --text FILE --longbench FOLDER`, then `page`; rows are in "]
    page[-1] += "`docs/results/caches`. The text is WikiText-2's test set, LongBench's are MiniLongBench's."
    page[-1] += f" {so_far(rows)}"
    page += ["", INTRODUCTION, "", *claims(rows)]
    panels = {
        f"{title}: {group}": (needles, settings(needles, (*methods, BASELINE), when))
        for when, title in (("with", "question in sight"), ("before", "before the question"))
        for group, methods in GROUPS.items()
    }
    plot(output.with_suffix(".png"), panels, share="stored of the cache, %", baselines={BASELINE}, columns=2)
    page += ["", "## Needles", "", f"![Nats lost over the share of the cache]({output.stem}.png)"]
    for length in lengths(rows, NEEDLES):
        some = of(rows, NEEDLES, length)
        for when, title in WHENS.items():
            asked = settings(some, METHODS, when)
            page += ["", f"### {title}, {length} tokens", ""]
            page += needles_table(some, asked, "kept, %", baselines(asked))
    long = of(rows, LONGBENCH)
    if long:
        page += ["", "## LongBench", ""]
        page += [
            "Official prompts of lcc and samsum, cut in their middle to 2048 tokens, and nats of the first right "
            "answer: these are not the official scores, which need answers that are generated. Compressed at the "
            "end of the prompt.",
            "",
        ]
        asked = settings(long, METHODS, "with")
        page += losses_table(long, asked, "kept, %", baselines(asked))
    for length in lengths(rows, [CONTINUATION]):
        some = of(rows, [CONTINUATION], length)
        asked = settings(some, METHODS, "with")
        page += ["", f"## Loss of 256 tokens behind a text of {length}", ""]
        page += [
            "They come in one call behind the compressed cache, also for `h2o` and `tova`. What is kept is counted "
            "behind them, where methods that act at the end of calls have dropped keys again.",
            "",
            *losses_table(some, asked, "kept, %", baselines(asked)),
        ]
    return page


def baselines(asked: list[Setting]) -> dict[str, str]:
    """The name of the baseline for each name of a setting."""
    return {
        setting.name: Setting(BASELINE, setting.asked, setting.when).name
        for setting in asked
        if setting.method not in (BASELINE, "think")
    }


def claims(rows: Rows) -> list[str]:
    """What is shown of what the papers say."""
    needles, behind = of(rows, NEEDLES), of(rows, [CONTINUATION])
    asked = {name: f"{name} {'0.8' if name == 'think' else '0.25'} with" for name in CLAIMS}

    def beats(name: str, other: str) -> str:
        return "" if name in (other, "think") else better(needles, asked[name], f"{other} 0.25 with")

    found = [
        "## Claims",
        "",
        f"{HOW_CLAIMS_ARE_JUDGED} A quarter of the cache is kept, unless the method's name says otherwise, with the "
        "question in sight; the last column is what it costs to compress before the question comes.",
        "",
        *claims_table(
            CLAIMS,
            asked,
            {
                "beats random keys": lambda name: beats(name, BASELINE),
                "beats the first and last keys": lambda name: beats(name, STREAMING),
                "little is lost": lambda name: near(needles, asked[name]),
                "little is lost in texts that go on": lambda name: near(behind, asked[name]),
                "breaks before the question": lambda name: (
                    ""
                    if name == STREAMING
                    else better(needles, asked[name].replace("with", "before"), asked[name], wants=1)
                ),
            },
        ),
        "",
    ]
    pairs = [
        ("PyramidKV's budgets by layer beat equal ones", "pyramidkv 0.25 with", "snapkv 0.25 with"),
        ("AdaKV's budgets by head beat equal ones", "adakv 0.25 with", "snapkv 0.25 with"),
        ("AdaKV's budgets by head beat equal ones, of a tenth", "adakv 0.1 with", "snapkv 0.1 with"),
    ]
    learned = {name for found in needles.values() for name in found if name.startswith("duo (learned gates)")}
    pairs += [
        ("DuoAttention's learned gates beat random ones", name, name.replace("learned", "random"))
        for name in sorted(learned)
    ]
    found += [f"- {claim} (`{name}`, `{other}`): {better(needles, name, other)}." for claim, name, other in pairs]
    if not learned:
        found.append("- DuoAttention's learned gates beat random ones: not measured.")
    return found
