"""Which families a variant refuses, by name and with the reason. A refusal that is not listed here fails the suite."""

from collections.abc import Iterable
from dataclasses import dataclass

from .families import FAMILIES, of_kind
from .vlms import VLMS

WITH_IMAGES = {"llava", "qwen2_5_vl", *VLMS}


@dataclass(frozen=True)
class Refusal:
    """Families that a variant refuses.

    Attributes:
        families: their names.
        says: what the error says.
        because: why it is right to.
        examples: the numbers of those among the variant's examples that it is true of; of all by default.
    """

    families: frozenset[str]
    says: str
    because: str
    examples: tuple[int, ...] | None = None


def _of(families: Iterable[str], says: str, because: str, *examples: int) -> Refusal:
    return Refusal(frozenset(families), says, because, examples or None)


_ONLY_DECODERS = [
    _of(
        [*of_kind("encoder", "vision"), "clip", "siglip"],
        "has no language modelling head to decode with",
        "only what writes text has a next token",
    ),
    _of(
        of_kind("encoder_decoder"),
        "needs a decoder-only language model",
        "a branch would need an encoder of its own",
    ),
]


def _of_causal_selection(*names: str) -> dict[str, list[Refusal]]:
    """Selectors act in causal self-attention alone, and leave out what else a model has."""
    without = [*of_kind("encoder", "vision"), "clip", "siglip"]
    because = "it says what a token reads of those before it, which an encoder does not have"
    return {name: [_of(without, "does not support bidirectional or cross", because)] for name in names}


def _of_pages(*names: str) -> dict[str, list[Refusal]]:
    """Those that choose pages of keys leave out sliding layers besides."""
    says, because = "leaves out layers with a sliding window", "their kv caches give keys no lasting place"
    slides = _of(["mistral", "gemma3_text"], says, because)
    return {name: [*found, slides] for name, found in _of_causal_selection(*names).items()}


def _of_images(*names: str) -> dict[str, list[Refusal]]:
    """What acts by image tokens."""
    because = "it is about what attention gives image tokens"
    says = "{!r} does not support without_images"
    return {name: [_of(FAMILIES.keys() - WITH_IMAGES, says.format(name), because)] for name in names}


def _of_grids(*names: str) -> dict[str, list[Refusal]]:
    """Those of the patches of an image act in vision towers alone, and leave out what else a model has."""
    towers = {*of_kind("vision"), "clip", "siglip", "llava", "qwen2_5_vl"}
    without = FAMILIES.keys() - towers
    return {name: [_of(without, "needs a vision tower", "there are no patches of an image")] for name in names}


_WITHOUT_SLOTS = [_of(["gpt_oss"], "does not support sinks", "its rows have no place for a logit without a value")]
_CAPPED = [_of(["gemma2"], "does not support softcap", "what it adds to the logits would be capped with them")]


def _of_encoder_masks(*names: str) -> dict[str, list[Refusal]]:
    """Those in which a token stands for what comes after it."""
    decoders = _of(
        of_kind("decoder"), "does not support causal or cross", "a decoder's token does not see what comes after it"
    )
    tower = _of(["clip"], "does not support causal, which", "its text tower says only in a call that it is causal")
    return {name: [decoders, tower] for name in names}


def _of_placed_pieces(*names: str) -> dict[str, list[Refusal]]:
    """Those that read pieces side by side must turn keys, and no window may hide some."""
    learned = ["gpt2", "opt", "t5", "bart", "whisper", "qwen2_5_vl"]
    sliding = ["mistral", "gemma2", "gemma3_text", "gpt_oss"]
    return {
        name: [
            *found,
            _of(learned, f"{name} must know how", "learned positions, biases and several axes cannot be turned"),
            _of(sliding, "has a sliding window", "it would hide pieces by their distance in the text"),
        ]
        for name, found in _of_causal_selection(*names).items()
    }


REFUSALS: dict[str, list[Refusal]] = {
    **_of_causal_selection("block_attention", "mswa", "power", "streaming", "triangle"),
    **_of_pages("flex_prefill", "longlora", "lserve", "moba", "quest", "twilight", "vertical_slash", "xattention"),
    **_of_encoder_masks("bibert", "hat", "hdt"),
    "hepos": [
        _of(
            FAMILIES.keys() - set(of_kind("encoder_decoder")),
            "divides a source among the heads of cross attention",
            "nothing else has a source",
        )
    ],
    **_of_placed_pieces("ape", "focus_icl", "graph_kv", "parallel_context"),
    **_of_pages("hip", "hyper", "recycled", "squeezed"),
    **_of_causal_selection("subsampled"),
    **_of_grids("agent", "axial", "biformer", "gpsa", "halo", "hilo", "maxvit", "neighborhood", "quadrangle"),
    **_of_grids("sparsifiner", "window"),
    "act": [
        _of(
            of_kind("encoder_decoder"),
            "'act' does not support cross",
            "what a key received is summed over its own sequence's rows, which cross-attention has none of",
        ),
    ],
    **_of_images("a_vl", "ee_mllm", "fastv", "hiprune", "pai", "paint", "rbd_like", "var", "vcd", "vhr"),
    "heads": [
        _of(
            of_kind("encoder_decoder"),
            "is cross attention, where rows are not counted",
            "rows of cross attention have no key of their own, by which tokens are told apart",
            1,
            2,
        ),
    ],
    "attention_transition": [
        *_of_causal_selection("attention_transition")["attention_transition"],
        _of(of_kind("encoder_decoder"), "reads with its encoder", "the decoder begins with one token, and no prompt"),
        *_WITHOUT_SLOTS,
    ],
    "fox": [
        *_of_causal_selection("fox")["fox"],
        *_CAPPED,
        _of(["gpt_oss"], "does not support sinks", "what all keys of a row have in common is left out of its bias"),
    ],
    "cope": [
        *_of_causal_selection("cope")["cope"],
        *_CAPPED,
        *_WITHOUT_SLOTS,
        _of(["t5"], "does not support position_bias", "its gates would count what a bias says of positions already"),
    ],
    "dma": [*_of_causal_selection("dma")["dma"], *_CAPPED],
    **_of_causal_selection("layer_shortcuts"),
    "cca": [
        *_of_pages("cca")["cca"],
        _of(
            ["gpt2", "opt", "t5", "bart", "whisper", "qwen2_5_vl"],
            "cca must know how",
            "learned positions, a bias of distances and several axes of positions cannot be turned",
        ),
    ],
    "landmark": [*_of_pages("landmark")["landmark"], *_WITHOUT_SLOTS],
    "gin": [
        *_WITHOUT_SLOTS,
        _of(
            [*of_kind("encoder", "vision"), "clip", "siglip"],
            "does not support bidirectional or cross",
            "where tokens see what comes after them, no causal filter leaves self-loops",
            1,
        ),
    ],
    "nosa": [*_of_pages("nosa")["nosa"], *_CAPPED],
    "nsa": [
        *_of_pages("nsa")["nsa"],
        _of(
            ["gpt_oss"], "does not support sinks", "attention to means of keys has no place for a logit without a value"
        ),
        _of(["t5"], "does not support position_bias", "means of keys stand at no position"),
    ],
    **dict.fromkeys(("attention_bias", "meta_tokens", "sink"), _CAPPED),
    **dict.fromkeys(("entmax", "sigmoid", "softpick", "talking_heads", "urpe"), _WITHOUT_SLOTS),
    "mta": [
        *_of_causal_selection("mta")["mta"],
        *_WITHOUT_SLOTS,
        _of(
            ["mistral", "gemma3_text"],
            "leaves out layers with a sliding window",
            "the softmax of an earlier row needs keys that are gone",
            0,
        ),
    ],
    "gqa_convert": [
        _of(
            FAMILIES.keys() - {"llama", "mistral", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_oss"},
            "its configuration knows no number of kv heads but that of its queries",
            "their code views keys as of so many heads as queries, in a tower at least",
        ),
        _of(
            ["qwen3", "gemma3_text"],
            "a norm comes after. method='mean' needs to know nothing of that",
            "a norm of keys undoes their scale, and comes between the projection and what is turned",
            0,
        ),
        _of(
            ["phi3"],
            "WGQA's factors are of projections of keys and of values",
            "one projection makes queries, keys and values",
            1,
        ),
    ],
    "shrp": [
        _of(
            [*of_kind("decoder"), "clip", "llava"],
            "'shrp' does not support causal",
            "it compresses encoders; its usage is counted over whole sequences",
        ),
        _of(
            ["distilbert", "modernbert", "t5", "bart", "whisper", "dinov2", "qwen2_5_vl"],
            "'shrp' does not know the layer of",
            "it takes the feed-forward part out of layers that are arranged as BERT's or ViT's",
        ),
    ],
    "self_extend": [
        *_of_causal_selection("self_extend")["self_extend"],
        _of(
            ["gpt2", "opt", "t5", "bart", "whisper", "qwen2_5_vl"],
            "self_extend must know how",
            "learned positions, a bias of distances and several axes of positions cannot be turned",
        ),
    ],
    "longheads": [
        *_of_pages("longheads")["longheads"],
        _of(
            ["gpt2", "opt", "t5", "bart", "whisper", "qwen2_5_vl"],
            "longheads must know how",
            "learned positions, a bias of distances and several axes of positions cannot be turned",
        ),
    ],
    "damro": [
        _of(
            FAMILIES.keys() - WITH_IMAGES,
            "is not a vision-language model",
            "it contrasts with a picture reduced to its outliers",
        ),
        _of(
            ["llava_siglip", "qwen2_5_vl"],
            "has no class token",
            "the paper chooses outliers by the attention of the class token",
            0,
        ),
    ],
    "attention_buckets": [
        _of(
            FAMILIES.keys()
            - {"llama", "mistral", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox", "gpt_oss", "llava"},
            "attention_buckets must know how",
            "other positions than rotary ones have no base",
        ),
    ],
    "toy_branch": _ONLY_DECODERS,
    "cad": _ONLY_DECODERS,
    "decore": _ONLY_DECODERS,
}
REFUSALS["paint"].append(
    _of(
        ["llava_siglip", "instructblip", "qwen2_5_vl"],
        "there is no class token, or tokens are no patches",
        "it ranks patches by the attention of the class token",
    )
)
REFUSALS["hiprune"].append(
    _of(
        ["llava_next", "instructblip", "qwen2_5_vl"],
        "are tiles, merged patches or queries",
        "it prunes patches by their neighbours in a row and in a column",
    )
)
