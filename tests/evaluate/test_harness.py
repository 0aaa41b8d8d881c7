import json
from importlib import metadata

import pytest

from leanmill.core.errors import ConfigError
from leanmill.evaluate import harness
from leanmill.recipe.evaluate import LmEval


RESULTS = {
    "results": {
        "colours": {"alias": "colours", "acc,none": 0.75, "acc_stderr,none": "N/A", "acc_norm,none": 0.5},
        "prose": {"alias": "prose", "word_perplexity,none": 12.5, "word_perplexity_stderr,none": 0.1},
        "sums": {"alias": "sums", "exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.1},
    },
    "higher_is_better": {
        "colours": {"acc": True, "acc_norm": True},
        "prose": {"word_perplexity": False},
        "sums": {"exact_match": True},
    },
    "n-samples": {name: {"original": 9, "effective": 4} for name in ("colours", "prose", "sums")},
}
"""As version 0.4 gives them."""


def test_every_metric_of_every_task_is_a_score():
    found = [(s.group, s.metric, s.value, s.count, s.lower_is_better) for s in harness.scores_of(RESULTS)]
    assert found == [
        ("colours", "acc", 0.75, 4, False),
        ("colours", "acc_norm", 0.5, 4, False),
        ("prose", "word_perplexity", 12.5, 4, True),
        ("sums", "exact_match (strict-match)", 0.25, 4, False),
    ]


def test_a_missing_or_strange_harness_is_named_with_what_to_type(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(ConfigError, match=r"not installed; type pip install 'leanmill\[harness\]'"):
        harness.check_tasks(LmEval(type="lm_eval", tasks=["colours"]))
    monkeypatch.setattr(metadata, "version", lambda name: "0.5.0")
    with pytest.raises(ConfigError, match=r"versions 0\.4, and 0\.5\.0 is installed"):
        harness.check_tasks(LmEval(type="lm_eval", tasks=["colours"]))


@pytest.mark.slow
def test_a_task_of_the_users_own_runs_through_the_harness(tmp_path):
    pytest.importorskip("lm_eval")
    from leanmill.evaluate.run import evaluate_models
    from tests.evaluate.test_run import model_folder, recipe

    folder = model_folder(tmp_path / "model", tmp_path)
    data = tmp_path / "colours.jsonl"
    data.write_text("".join(json.dumps({"q": f"line {i}", "a": i % 2}) + "\n" for i in range(6)))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "colours.yaml").write_text(
        f"task: colours\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_target: a\ndoc_to_choice: ["red", "blue"]\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    task = {"type": "lm_eval", "tasks": ["colours"], "include_path": str(tasks), "limit": 4}
    compared = evaluate_models(recipe(tmp_path, [task]), [folder])
    (score,) = compared.scores[folder]
    assert (score.group, score.metric, score.count) == ("colours", "acc", 4)
    with pytest.raises(ConfigError, match="knows no task 'colour'"):
        evaluate_models(recipe(tmp_path, [task | {"tasks": ["colour"]}]), [folder])
