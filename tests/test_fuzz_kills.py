"""Processes that are killed while they save: what they leave is the old save or the new one, and no litter."""

import multiprocessing
import random
import time

import pytest

import patchattn

from .kills import SAVE, base_model, model_of, numbers_of, save_again_and_again

KILLS, SEED = 20, 7


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.kills", "transformers.models.llama.modeling_llama"])
    return context


def load(kind, folder):
    if kind == "save_patch":
        return patchattn.load_patch(base_model(), folder)
    return patchattn.from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SAVE)
def test_a_killed_save_leaves_the_old_one_or_the_new_one(kind, processes, tmp_path):
    draw = random.Random(SEED)
    patchattn_files = tmp_path / "reference"
    SAVE[kind](model_of(1), patchattn_files)
    names = {path.name for path in patchattn_files.iterdir()}
    seen, litter = set(), 0
    for number in range(KILLS):
        folder = tmp_path / str(number)
        SAVE[kind](model_of(9), folder)
        saved = processes.Value("i", 0)
        process = processes.Process(target=save_again_and_again, args=(kind, str(folder), saved))
        process.start()
        deadline = time.monotonic() + 60
        while not saved.value and time.monotonic() < deadline:
            time.sleep(0.01)
        assert saved.value, "the process does not save"
        time.sleep(draw.uniform(0.0, 0.2))
        process.kill()
        process.join()
        litter += {path.name for path in folder.iterdir()} != names
        found = numbers_of(load(kind, folder), whole=kind == "save_pretrained")
        assert len(found) == 1, f"kill {number}: {found}"
        seen |= found
        SAVE[kind](model_of(9), folder)
        assert {path.name for path in folder.iterdir()} == names, f"kill {number}"
        assert numbers_of(load(kind, folder), whole=kind == "save_pretrained") == {9}
    assert len(seen) > 1
    assert litter > 3  # the kills came while files were written


@pytest.mark.slow
@pytest.mark.parametrize("kind", SAVE)
def test_a_reader_beside_a_process_that_saves_sees_one_save(kind, processes, tmp_path):
    SAVE[kind](model_of(9), tmp_path)
    saved = processes.Value("i", 0)
    process = processes.Process(target=save_again_and_again, args=(kind, str(tmp_path), saved))
    process.start()
    seen, busy = set(), 0
    try:
        for _ in range(60):
            try:
                found = numbers_of(load(kind, tmp_path), whole=kind == "save_pretrained")
            except ValueError as error:
                if "was rewritten" not in str(error):
                    raise
                busy += 1
                continue
            assert len(found) == 1, found
            seen |= found
    finally:
        process.kill()
        process.join()
    assert saved.value > 20
    assert len(seen) > 1 or busy > 50, (seen, busy)
