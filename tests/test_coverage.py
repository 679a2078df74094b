"""The sweep over model types: its rows are right, and the committed table still holds."""

from pathlib import Path

import pytest

from patchattn import list_variants
from patchattn.checking.coverage import Row, current_versions, patchable_types, sweep, to_markdown

TABLE = Path(__file__).parents[1] / "docs" / "coverage.md"
FLOOR = 226  # model types that a crude pass-through sweep of transformers 5.23 ran
TYPES = ["bert", "llama", "bart", "siglip_vision_model", "deberta-v2", "rwkv", "resnet", "layoutlmv2"]


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    seen: list[tuple[str, int, int]] = []
    found = sweep(TYPES, progress=lambda row, done, total: seen.append((row.model_type, done, total)))
    assert seen == [(name, i + 1, len(TYPES)) for i, name in enumerate(TYPES)]
    return {row.model_type: row for row in found}


@pytest.mark.parametrize("name", ["bert", "llama", "bart", "siglip_vision_model", "deberta-v2"])
def test_a_patchable_type_ran_and_held(rows, name):
    row = rows[name]
    assert row.status == "patchable", row.reason
    assert row.findings.neutral_difference == 0
    assert row.findings.reached == row.ran_sites > 0
    assert row.findings.half_the_heads == row.findings.learned_router == row.findings.ssa == "runs"
    assert row.findings.geometry == "right"


def test_sites_are_those_of_the_default_configuration(rows):
    assert (rows["llama"].self_sites, rows["llama"].cross_sites) == (32, 0)
    assert (rows["bart"].self_sites, rows["bart"].cross_sites) == (24, 12)
    assert rows["bart"].towers == ["encoder", "decoder"]


def test_a_refusal_names_family_and_reason(rows):
    row = rows["rwkv"]
    assert row.status == "refused"
    assert "'rwkv'" in row.reason
    assert "RwkvSelfAttention" in row.reason
    assert row.findings is None


def test_a_type_without_attention_and_one_that_cannot_be_built(rows):
    assert rows["resnet"].status == "no attention"
    if rows["layoutlmv2"].status != "not built":
        pytest.skip("detectron2 is installed, so LayoutLMv2 can be built")
    assert "detectron2" in rows["layoutlmv2"].reason


def test_the_page_has_the_rows(rows):
    page = to_markdown(list(rows.values()), current_versions())
    assert "| patchable | 5 |" in page
    assert rows["deberta-v2"].gate == "own code"
    cells = [
        "llama",
        "LlamaModel",
        "patchable",
        "32 + 0",
        "registry",
        "4 of 4",
        "right",
        "0",
        *["runs"] * 3,
        "exact on 4 of 4",
        "",
    ]
    assert f"| {' | '.join(cells)} |" in page
    assert "| rwkv | RwkvModel | refused |" in page
    assert "Without attention: resnet." in page
    assert patchable_types(page) == {"bert", "llama", "bart", "siglip_vision_model", "deberta-v2"}


def test_the_probe_does_not_stay_registered(rows):
    assert "coverage_probe" not in list_variants()


def test_a_type_that_takes_too_long_costs_one_row():
    (row,) = sweep(["bert"], timeout=0.0)
    assert row.status == "not built"
    assert "took more than" in row.reason


def test_an_unknown_type_is_an_error():
    with pytest.raises(ValueError, match="no model type 'lama'"):
        sweep(["lama"])


def test_the_committed_table_reaches_the_floor():
    page = TABLE.read_text()
    assert len(patchable_types(page)) >= FLOOR
    assert "| failed | 0 |" in page


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_committed_table_still_holds():
    page = TABLE.read_text()
    if f"transformers {current_versions()['transformers']}," not in page:
        pytest.skip("the committed table is of another version of transformers")
    patchable = {row.model_type for row in sweep() if row.status == "patchable"}
    assert patchable >= patchable_types(page)
    assert len(patchable) >= FLOOR
