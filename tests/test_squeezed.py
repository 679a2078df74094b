"""Squeezed Attention (arXiv 2411.09688) against loops over clusters, with one level and with two."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import patchattn
from patchattn.cli.main import main
from patchattn.core.kv_caches import cache_argument
from patchattn.variants.selection.squeezed import PrefixClusters, prefix_clusters

from .behaviour import close, positions
from .families import FAMILIES, outputs
from .reference import DIM, HEADS, KV_HEADS, tiny_llama
from .selecting import Recorded, attended, recorded

PREFIX, WINDOW = list(range(3, 19)), 4  # so that twelve keys are clustered
QUESTION = [30, 31, 32, 33]
TOKENS = torch.tensor([PREFIX + QUESTION])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    return recorded(monkeypatch)


def clusters_of(model: nn.Module, *, coarse: float | None = None) -> PrefixClusters:
    return prefix_clusters(model, PREFIX, share=0.5, coarse=coarse, window=WINDOW)


def scores_by_loops(queries: np.ndarray, keys: np.ndarray, labels: np.ndarray, left: set[int]) -> dict[int, float]:
    """By cluster, the weight of one of its keys, a mean over queries `(T, D)`, of keys `(n, D)`; equation of 4.2."""
    means = {c: keys[labels == c].mean(axis=0) for c in set(labels.tolist())}
    found = dict.fromkeys(means, 0.0)
    for query in queries:
        total = sum((labels == c).sum() * np.exp(query @ means[c] / np.sqrt(DIM)) for c in means if c in left)
        for c in means:
            found[c] += np.exp(query @ means[c] / np.sqrt(DIM)) / total / len(queries) if total else 0.0
    return found


def read_by_loops(
    queries: np.ndarray, keys: np.ndarray, known: PrefixClusters, kv: int, thresholds: tuple[float, ...]
) -> set[int]:
    """The keys of the prefix that are read for queries `(T, D)`, of those that are clustered, `(n, D)`."""
    fine = known.fine[0][kv].numpy()
    left = set(fine.tolist())
    if known.coarse:
        of_fine = known.coarse[0][kv].numpy()
        of_keys = of_fine[fine]
        above = {
            c: np.mean([keys[fine == f].mean(axis=0) for f in left if of_fine[f] == c], axis=0) for c in set(of_keys)
        }
        moved = np.stack([above[c] for c in of_keys])  # every key at the mean of its means
        high = scores_by_loops(queries, moved, of_keys, set(of_keys.tolist()))
        left = {f for f in left if high[of_fine[f]] > thresholds[1]}
    scores = scores_by_loops(queries, keys, fine, left)
    return {place for place, f in enumerate(fine.tolist()) if f in left and scores[f] > thresholds[0]}


@pytest.mark.parametrize("coarse", [None, 0.25])
@pytest.mark.parametrize("heads", ["kv", "query"])
@pytest.mark.parametrize("sparsity", [0.4, 0.8])
def test_what_follows_reads_the_clusters_above_the_threshold(
    heads: str, coarse: float | None, sparsity: float, calls: Recorded
) -> None:
    model = tiny_llama()
    known = clusters_of(model, coarse=coarse)
    patchattn.patch_model(model, "squeezed", clusters=known, sparsity=sparsity, heads=heads)
    cache = DynamicCache(config=model.config)
    for part in (TOKENS, torch.tensor([[40]]), torch.tensor([[41, 42]])):
        outputs(model, input_ids=part, **cache_argument(model, cache))
    thresholds, fewer, length = known.thresholds(sparsity), 0, len(PREFIX)
    for call, seen, output in calls:
        np.testing.assert_allclose(output.numpy(), attended(call, seen.numpy()), rtol=1e-9, atol=1e-12)
        first = call.key.shape[2] - call.query.shape[2]
        behind = slice(max(0, length - first), None)
        keys = call.key[0, :, : length - WINDOW].numpy()
        read = [
            read_by_loops(call.query[0, head, behind].numpy(), keys[head // 2], known, head // 2, thresholds)
            for head in range(HEADS)
        ]
        if heads == "kv":
            read = [read[head // 2 * 2] | read[head // 2 * 2 + 1] for head in range(HEADS)]
        for head in range(HEADS):
            for i in range(call.query.shape[2]):
                place, got = first + i, set(seen[0, head, i].nonzero().flatten().tolist())
                rest = set(range(length - WINDOW, place + 1))
                assert got == (set(range(place + 1)) if place < length else read[head] | rest)
                fewer += len(got) < place + 1
    assert fewer


def test_clusters_that_score_alike_are_read_or_left_together(calls: Recorded) -> None:
    """Scores are compared with a threshold, so that of equal ones none comes first; a score that equals it is left."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.zero_()  # a key scores 1 / 12 in whatever cluster
    known = clusters_of(model)
    share = np.float32(1 / 12)
    for threshold, reads in ((float(np.nextafter(share, np.float32(0))), True), (0.1, False)):
        calls.clear()
        same = PrefixClusters(known.fine, torch.full_like(known.scores, threshold), WINDOW, tokens=known.tokens)
        with patchattn.patched(model, "squeezed", clusters=same, sparsity=0.5):
            outputs(model, input_ids=TOKENS)
        seen = calls[0][1][0, :, -1, : len(PREFIX) - WINDOW]
        assert bool((seen == reads).all())


@pytest.mark.parametrize("coarse", [None, 0.25])
def test_thresholds_are_quantiles_of_what_keys_score_for_the_last_tokens(coarse: float | None) -> None:
    model, seen = tiny_llama(num_hidden_layers=2), []
    known = clusters_of(model, coarse=coarse)
    with patchattn.probed(model, lambda call, _: seen.append((call.query[0].numpy(), call.key[0].numpy()))):
        outputs(model, input_ids=TOKENS[:, : len(PREFIX)])
    scores = []
    for layer, (query, key) in enumerate(seen):
        for head in range(HEADS):
            labels = known.fine[layer][head // 2].numpy()
            found = scores_by_loops(query[head, -WINDOW:], key[head // 2, :-WINDOW], labels, set(labels.tolist()))
            scores += [found[c] for c in labels.tolist()]
    for sparsity in (0.5, 0.7, 0.9):
        assert known.thresholds(sparsity)[0] == pytest.approx(np.quantile(scores, sparsity), rel=1e-5)
    assert known.sizes == ((6,) if coarse is None else (6, 3))
    assert {tuple(labels.shape) for labels in known.fine.values()} == {(KV_HEADS, 12)}


def test_clusters_are_of_keys_that_point_the_same_way() -> None:
    """Of two bundles of rays, whatever the lengths."""
    from patchattn.variants.selection.squeezed.clusters import _clustered

    rays = torch.tensor([[1.0, 0.1], [50.0, 0.0], [0.1, 2.0], [0.0, 0.3], [7.0, 0.5]])
    labels = _clustered(rays, 2, seed=0).tolist()
    assert labels[0] == labels[1] == labels[4] != labels[2] == labels[3]


def test_a_prefix_in_the_cache_a_question_and_padded_rows_are_one_forward(calls: Recorded) -> None:
    model = FAMILIES["llama"].make_exact()
    patchattn.patch_model(model, "squeezed", clusters=clusters_of(model), sparsity=0.8)
    whole = outputs(model, input_ids=TOKENS)[0]
    cache, length = DynamicCache(config=model.config), len(PREFIX)
    parts = [
        outputs(model, input_ids=part, **cache_argument(model, cache))[0]
        for part in TOKENS.split([5, length - 5, len(QUESTION)], dim=1)
    ]
    close(torch.cat(parts, dim=1), whole)
    states = [state for layer in cache.layers for state in layer.sequence_states.values()]
    assert states
    assert all("means" in state.tensors for state in states)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), TOKENS[:, :-3]], dim=1)
    together, mask = torch.cat([TOKENS, padded]), torch.ones(2, TOKENS.shape[1], dtype=torch.long)
    mask[1, :3] = 0
    ids = {"attention_mask": mask, "position_ids": positions(mask)}
    cache = DynamicCache(config=model.config)
    found = outputs(model, input_ids=together, **ids, **cache_argument(model, cache))[0]
    close(found[:1], whole)
    close(found[1:, 3:], outputs(model, input_ids=TOKENS[:, :-3])[0])
    cache.reorder_cache(torch.tensor([1, 0]))
    calls.clear()
    mask = torch.cat([mask.flip(0), torch.ones(2, 1, dtype=torch.long)], dim=1)
    ids = {"attention_mask": mask, "position_ids": positions(mask)[:, -1:]}
    step = outputs(model, input_ids=torch.tensor([[50], [51]]), **ids, **cache_argument(model, cache))[0]
    for row, (tokens, last) in enumerate([(TOKENS[:, :-3], 50), (TOKENS, 51)]):
        alone = DynamicCache(config=model.config)
        outputs(model, input_ids=tokens, **cache_argument(model, alone))
        close(step[row : row + 1], outputs(model, input_ids=torch.tensor([[last]]), **cache_argument(model, alone))[0])


def test_prompts_that_do_not_begin_with_the_prefix_are_refused() -> None:
    model = FAMILIES["llama"].make()
    patchattn.patch_model(model, "squeezed", clusters=clusters_of(model))
    other = TOKENS.clone()
    other[0, 7] = 60
    for wrong, says in ((other, "token 7 of sequence 0 is 60, expected 10"), (TOKENS[:, 1:], "token 0 of .* is 4")):
        with pytest.raises(ValueError, match=f"does not begin with the prefix of 16 tokens.*{says}"):
            outputs(model, input_ids=wrong)
    two = torch.cat([TOKENS, other])
    with pytest.raises(ValueError, match="token 7 of sequence 1"):
        outputs(model, input_ids=two)
    cache = DynamicCache(config=model.config)
    outputs(model, input_ids=TOKENS[:, :5], **cache_argument(model, cache))
    with pytest.raises(ValueError, match="token 7 of sequence 0 is 60"):
        outputs(model, input_ids=other[:, 5:], **cache_argument(model, cache))
    embeddings = model.get_input_embeddings()(TOKENS)
    with pytest.raises(NotImplementedError, match="squeezed needs input_ids"):
        outputs(model, inputs_embeds=embeddings)
    plain = DynamicCache(config=model.config)
    with patchattn.unpatched(model):
        outputs(model, input_ids=TOKENS, **cache_argument(model, plain))
    with pytest.raises(ValueError, match="filled without"):
        outputs(model, input_ids=TOKENS[:, :1], **cache_argument(model, plain))


def test_generation_with_and_without_a_cached_prefix() -> None:
    model = FAMILIES["llama"].make_exact()
    patchattn.patch_model(model, "squeezed", clusters=clusters_of(model), sparsity=0.8)
    how: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(TOKENS, **how)
    cache = DynamicCache(config=model.config)
    outputs(model, input_ids=TOKENS[:, : len(PREFIX)], **cache_argument(model, cache))
    assert torch.equal(model.generate(TOKENS, past_key_values=cache, **how), expected)
    assert model.generate(TOKENS, num_beams=3, **how).shape == expected.shape


def test_files_and_saved_patches_hold_what_was_found(tmp_path: Path) -> None:
    model = FAMILIES["llama"].make()
    known = clusters_of(model, coarse=0.25)
    path = tmp_path / "clusters.safetensors"
    known.save(path, share=0.5)
    read = PrefixClusters.load(path)
    assert read.thresholds(0.7) == known.thresholds(0.7)
    assert (read.base, read.length, read.sizes) == (known.base, 16, (6, 3))
    patchattn.patch_model(model, "squeezed", clusters=path, sparsity=0.8)
    expected = outputs(model, input_ids=TOKENS)[0]
    patchattn.save_patch(model, tmp_path / "patch")
    path.unlink()
    loaded = patchattn.load_patch(FAMILIES["llama"].make(), tmp_path / "patch")
    assert torch.equal(outputs(loaded, input_ids=TOKENS)[0], expected)
    with pytest.raises(ValueError, match="does not begin with the prefix"):
        outputs(loaded, input_ids=TOKENS + 1)
    with pytest.raises(ValueError, match=r"There is no file .*calibrate squeezed"):
        patchattn.patch_model(FAMILIES["llama"].make(), "squeezed", clusters=path)
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="is damaged or not a file that"):
        patchattn.patch_model(FAMILIES["llama"].make(), "squeezed", clusters=path)


def test_clusters_of_another_model_and_unfit_ones_are_refused() -> None:
    model = FAMILIES["llama"].make()
    known = clusters_of(model)
    with pytest.raises(ValueError, match=r"squeezed needs clusters=\.\.\.: the file"):
        patchattn.patch_model(model, "squeezed")
    with pytest.raises(ValueError, match=r"file of clusters is for llama of 2 layers .*belongs to qwen3"):
        patchattn.patch_model(FAMILIES["qwen3"].make(), "squeezed", clusters=known)
    plain = PrefixClusters(known.fine, known.scores, known.window)
    with pytest.raises(ValueError, match=r"clusters are of 2 kv heads, and .* has 4"):
        patchattn.patch_model(FAMILIES["gpt2"].make(), "squeezed", clusters=plain)
    with pytest.raises(ValueError, match="clusters of the layers"):
        patchattn.patch_model(
            model, "squeezed", clusters=PrefixClusters({1: known.fine[1]}, known.scores, known.window), layers=0
        )
    with pytest.raises(ValueError, match="the prefix has 16 tokens"):
        PrefixClusters(known.fine, known.scores, known.window, tokens=torch.arange(3))
    with pytest.raises(ValueError, match="numbered from 0"):
        PrefixClusters({0: known.fine[0] - 1}, known.scores, known.window)
    assert not patchattn.patch_info(model)["patches"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"window": 16}, "a prefix longer than the window"),
        ({"window": 0}, "a window of at least 1"),
        ({"share": 0.0}, "a share above 0"),
        ({"share": 0.5, "coarse": 0.5}, "of the second level fewer than of the first"),
    ],
)
def test_calibration_refuses_what_gives_no_clusters(words: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        prefix_clusters(FAMILIES["llama"].make(), PREFIX, **{"window": WINDOW, **words})


def test_calibration_is_of_a_model_as_it_is() -> None:
    model = FAMILIES["llama"].make()
    with pytest.raises(ValueError, match=r"model\.eval"):
        prefix_clusters(model.train(), PREFIX, window=WINDOW)
    patchattn.patch_model(model.eval(), "streaming")
    with pytest.raises(ValueError, match="without a patch"):
        prefix_clusters(model, PREFIX, window=WINDOW)
    assert not patchattn.patch_info(model)["patches"][1:]


def test_the_command_writes_what_a_patch_reads(tmp_path: Path, data_dir: Path) -> None:
    model, text = data_dir / "models" / "stories260K", tmp_path / "prefix.txt"
    text.write_text("Once upon a time, there was a little girl who had a red ball and a dog.")
    output = tmp_path / "squeezed.safetensors"
    command = ["calibrate", "squeezed", str(model), str(text), "--output", str(output), "--window", "5"]
    with pytest.raises(SystemExit) as done:
        main([*command, "--share", "0.3"])
    assert done.value.code in (0, None)
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    patchattn.patch_model(loaded, "squeezed", clusters=str(output), sparsity=0.9)
    ids = tokenizer(text.read_text(), return_tensors="pt").input_ids
    question, told = torch.cat([ids, ids[:, -3:]], dim=1), []
    with patchattn.observe(loaded, lambda observation: told.append(observation.values["density"])):
        outputs(loaded, input_ids=question)
    assert min(float(density[0, -1].min()) for density in told) < 1.0
    with pytest.raises(ValueError, match="does not begin with the prefix"):
        outputs(loaded, input_ids=question[:, 1:])
