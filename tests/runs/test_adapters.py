"""Which adapter is the newest, which the best, and how a command names the one that it takes."""

import pytest

from qwen_vl_lora.exceptions import MissingArtifactError
from qwen_vl_lora.runs.adapters import adapter_in_words, best_adapter, data_in_words, trained_adapters
from qwen_vl_lora.runs.records import Record


@pytest.fixture
def record(tmp_path):
    """`record("r1", "tiny", trains=True, cider=1.0, of="r0")`: a run that trains, evaluates, or both."""

    def make(run_id, recipe="tiny", *, trains=False, cider=None, of=None, source=None):
        written, read = {}, {}
        if trains:
            folder = tmp_path / recipe / run_id
            folder.mkdir(parents=True)
            written["adapter"] = {"version": run_id, "path": f"{recipe}/{run_id}"}
        if of is not None:
            read["adapter"] = {"version": of}
        if cider is not None:
            written["caption_metrics"] = {"version": run_id}
        if source is not None:
            read["captioned_images"] = {"describe": {"filepath": source}}
        results = {} if cider is None else {"caption_metrics": {"num_images": 64, "tuned": {"CIDEr": cider}}}
        facts = {"id": run_id, "recipe": recipe, "outcome": "finished", "results": results}
        return Record(tmp_path, {**facts, "datasets": {"read": read, "written": written}})

    return make


def test_an_adapter_has_the_score_of_its_newest_evaluation(record, tmp_path):
    records = [record("r1", trains=True, cider=9.26), record("r2", trains=True), record("r3", of="r1", cider=8.0)]
    first, second = trained_adapters(records, tmp_path)
    assert (first.version, first.measured) == ("r1", "CIDEr 8.00 on 64 pictures")
    assert (second.version, second.measured) == ("r2", "never evaluated")
    assert best_adapter([first, second]) is first


def test_the_newest_of_equal_scores_is_the_best(record, tmp_path):
    adapters = trained_adapters([record("r1", trains=True, cider=2.0), record("r2", trains=True, cider=2.0)], tmp_path)
    assert best_adapter(adapters).version == "r2"


def test_an_adapter_that_was_removed_is_left_out(record, tmp_path):
    made = record("r1", trains=True)
    (tmp_path / "tiny" / "r1").rmdir()
    assert trained_adapters([made], tmp_path) == []


def test_a_trial_that_answers_for_a_better_adapter_says_so(record, tmp_path):
    adapters = trained_adapters([record("r1", trains=True, cider=9.26), record("r2", trains=True)], tmp_path)
    line = adapter_in_words("tiny", "r2", adapters, "the newest of recipe tiny", '--load-versions "adapter:VERSION"')
    assert line == (
        "Adapter: r2 of recipe tiny, never evaluated (the newest of recipe tiny). "
        'r1 has CIDEr 9.26 on 64 pictures: --load-versions "adapter:r1".'
    )


def test_a_newer_adapter_of_another_recipe_is_named(record, tmp_path):
    records = [record("r1", trains=True, cider=9.26), record("r2", "own_captions", trains=True)]
    line = adapter_in_words("tiny", "r1", trained_adapters(records, tmp_path), "named by --adapter", "x")
    assert line == (
        "Adapter: r1 of recipe tiny, CIDEr 9.26 on 64 pictures (named by --adapter). "
        "Recipe own_captions has a newer adapter."
    )


def test_an_adapter_without_record_is_never_evaluated():
    assert adapter_in_words("tiny", "v9", [], "x", "y") == "Adapter: v9 of recipe tiny, never evaluated (x)."


def test_data_are_named_with_their_source(record):
    assert data_in_words(record("r1", source="my/captions.csv"), "r1") == (
        "Data: r1 of recipe tiny, made from my/captions.csv."
    )


class TestCaption:
    """`qwen-vl-lora caption` without --env."""

    @pytest.fixture
    def adapters(self, record, tmp_path):
        records = [
            record("r1", trains=True, cider=9.26),
            record("r2", "own_captions", trains=True, cider=0.4),
            record("r3", "own_captions", trains=True),
        ]
        return trained_adapters(records, tmp_path)

    @pytest.mark.parametrize(("wanted", "chosen"), [(None, "r3"), ("best", "r2"), ("r1", "r1"), ("none", None)])
    def test_it_takes_the_newest_of_all_recipes_or_the_one_that_is_named(self, adapters, wanted, chosen):
        from qwen_vl_lora.commands.caption import choose

        found = choose(adapters, wanted)
        assert (found and found.version) == chosen

    def test_the_best_of_none_is_an_error(self, adapters):
        from qwen_vl_lora.commands.caption import choose

        with pytest.raises(MissingArtifactError, match="No adapter of recipe own_captions was evaluated"):
            choose(adapters[2:], "best")
