"""The page on variants that say which keys are read."""

from pathlib import Path

from .cases import NEEDLES, TEXT
from .methods import selection_methods
from .pictures import plot
from .recall_rows import lines as recall_lines
from .tables import (
    HOW_CLAIMS_ARE_JUDGED,
    PARTS,
    Rows,
    Setting,
    better,
    claims_table,
    lengths,
    near,
    needles_table,
    of,
    positions_table,
    settings,
    so_far,
)

GROUPS = {
    "steps": "Methods that act in decoding",
    "question": "Methods that know the text before the question comes",
    "rows": "Every token chooses for itself",
    "prompt": "Methods that act in the call of a prompt",
}
BASELINE = {"steps": "random pages", "question": "random pages, question", "rows": "streaming", "prompt": "streaming"}
INTRODUCTION = """\
Every prompt was taken by the dense model and by each method; differences are of pairs, with their standard errors. \
Answers are forced: the columns of tasks are the share of prompts in which every token of the answer is the most \
likely one, so that greedy decoding writes it; nats are the answer's mean loss a token (all tasks), the lower the \
better. `read` is what the variants report, keys read over keys seen, of all layers (those that a method leaves \
dense read all) and all tokens for which it acts; in a prompt the first tokens see so few keys that it lies above \
what was asked for. The baseline of methods that act in decoding is `random pages` with the same setting, of the \
others `streaming`; where a method has a share of the attention in place of a share of the keys, it is the baseline \
at 0.25.

Methods that act in decoding read a prompt densely but for its last token, which is given by itself, as in a second \
turn. Those of a prompt leave decoding dense. `squeezed` has clustered the keys of each prompt's text, all that \
comes before its question, and acts in the question and the answer, with the last 100 tokens of the text always \
read; its setting is the share of the other keys that is left out, and its baseline draws as many for every token. \
Blocks are smaller than in the papers, as are lengths: `patchattn info NAME` has the published settings, \
`benchmarks/answer_parts/methods.py` those of this page."""
# what each paper says of its choice, with what is compared
CLAIMS = {
    "streaming": "The first keys and the last ones are enough for fluent text",
    "quest": "Pages with high bounds hold what is asked for",
    "quest, page 4": "So do those of smaller pages",
    "twilight": "As few keys as hold a share of the attention are enough",
    "lserve": "Pages chosen by smaller ones hold what is asked for, also where a choice lasts four tokens",
    "lserve, page 16": "So do smaller ones",
    "recycled": "What an earlier token attended to most serves later ones",
    "squeezed": "Clusters of a known text tell which of its keys matter to a question",
    "mswa": "Windows of several sizes serve better than one",
    "power": "Blocks at powers of two serve better than a window",
    "hip": "A tree finds what is asked for",
    "vertical_slash": "Columns and diagonals that the end of a prompt attends to hold what is asked for",
    "triangle": "Early tokens of a prompt need no distant keys in later layers",
    "hyper": "Buckets and a sample estimate attention",
    "flex_prefill": "Lines or blocks that hold a share of the attention are enough",
    "xattention": "Antidiagonals tell which blocks matter",
}

SHARES = {"twilight": "0.85", "flex_prefill": "0.7", "xattention": "0.7"}  # of the attention
LEFT_OUT = {"squeezed": "0.7"}  # of the keys


def baselines(asked: list[Setting], group: str) -> dict[str, str]:
    """The name of the baseline for each name of a setting."""
    same = {"0.05", "0.1", "0.25", "0.5"}
    return {
        setting.name: f"{BASELINE[group]} {setting.asked if group == 'question' or setting.asked in same else '0.25'}"
        for setting in asked
    }


def lines(rows: Rows, conditions: str, output: Path, folder: Path) -> list[str]:
    """The page from the rows that are there, and its pictures beside it."""
    methods = selection_methods()
    groups = {
        how: [method.name for method in methods if method.how == how or method.name == BASELINE[how]] for how in GROUPS
    }
    needles = of(rows, NEEDLES)
    page = ["# Which keys are read: what answers lose", "", conditions, ""]
    page += [
        "`python benchmarks/answers.py run selection DIR --text FILE`, then `page`; rows are in "
        f"`docs/results/selection`. The text is WikiText-2's test set. {so_far(rows)}",
        "",
    ]
    page += [INTRODUCTION, "", *claims(rows)]
    panels = {title: (needles, settings(needles, groups[how])) for how, title in GROUPS.items()}
    plot(output.with_suffix(".png"), panels, share="keys read, %", baselines=set(BASELINE.values()))
    page += ["", "## Needles", "", f"![Nats lost over the share of keys read]({output.stem}.png)"]
    for length in lengths(rows, NEEDLES):
        page += ["", f"### {length} tokens"]
        some = of(rows, NEEDLES, length)
        for how, title in GROUPS.items():
            asked = settings(some, groups[how])
            if asked:
                page += ["", f"{title}:", "", *needles_table(some, asked, "read, %", baselines(asked, how))]
    page += ["", "## Loss by position", ""]
    page += [
        "Texts of WikiText-2 in one call, cut into four parts; nats a token of the dense model, and what is added to "
        "them. What acts in decoding alone was told that every token chooses for itself, which is what decoding token "
        "by token does; `recycled` has no such setting and is left out.",
    ]
    for length in lengths(rows, [TEXT]):
        some = of(rows, [TEXT], length)
        asked = [setting for how in GROUPS for setting in settings(some, groups[how])]
        page += ["", f"### {length} tokens", "", *positions_table(some, list(dict.fromkeys(asked)), "read, %")]
    return [*page, "", *recall_lines(folder)]


def claims(rows: Rows) -> list[str]:
    """What is shown of what the papers say."""
    needles, texts, last = of(rows, NEEDLES), of(rows, [TEXT]), PARTS + 3
    methods = {method.name: method for method in selection_methods()}
    asked = {name: f"{name} {({**SHARES, **LEFT_OUT}).get(name, '0.25')}" for name in CLAIMS}

    def beats(name: str) -> str:
        other = f"{BASELINE[methods[name].how]} {LEFT_OUT.get(name, '0.25')}"
        return "" if other == asked[name] else better(needles, asked[name], other)

    return [
        "## Claims",
        "",
        f"{HOW_CLAIMS_ARE_JUDGED} Needles of all lengths are pooled. Methods that act in decoding, or on a "
        "question, must beat random pages, the others streaming.",
        "",
        *claims_table(
            CLAIMS,
            asked,
            {
                "beats the baseline": beats,
                "little is lost": lambda name: near(needles, asked[name]),
                "little is lost at the end of texts": lambda name: (
                    "" if methods[name].text is None else near(texts, asked[name], place=last)
                ),
            },
        ),
    ]
