import json
from types import SimpleNamespace

from leanmill.evaluate.run import Compared
from leanmill.evaluate.scores import Score
from leanmill.report.page.comparison_view import comparison_section
from leanmill.report.page.data import load_run


def score(value, *, group="left", low=True, items=None):
    metric = "bits/byte" if low else "accuracy"
    return Score(task="t<i>", group=group, metric=metric, value=value, count=4, lower_is_better=low, items=items)


def shown(compared):
    return comparison_section(SimpleNamespace(comparison=json.loads(json.dumps(compared.as_json()))))


def test_what_evaluate_wrote_is_shown_with_what_is_beyond_the_bound():
    right = (True, True, False, False)
    dense = [score(2.0), score(2.0, group="right"), score(0.5, low=False, items=right)]
    sparse = [score(2.01), score(2.2, group="right"), score(0.5, low=False, items=right[::-1])]
    broken = [score(float("nan")), score(2.0, group="right"), score(0.5, low=False, items=right)]
    scores = {"dense": dense, "sparse": sparse, "broken": broken}
    text = shown(Compared(scores=scores, dense="dense", bound=0.02)).content
    assert "t&lt;i&gt; · right · bits/byte" in text
    assert "<strong>+10%, beyond the bound</strong>" in text.replace("10.0%", "10%")
    assert "<strong>everything, beyond the bound</strong>" in text
    assert "(100% changed)" in text.replace("100.0%", "100%")
    assert "2 groups lost more" in text
    assert text.count("<strong>") == 2


def test_scores_without_a_dense_model_and_files_of_other_forms(tmp_path):
    section = shown(Compared(scores={"one": [score(2.0)]}, dense=None, bound=None))
    assert "lost" not in section.content
    for content in ("[]", "{", '{"models": {}}', '{"models": 3}'):
        (tmp_path / "evaluation.json").write_text(content)
        assert comparison_section(load_run(tmp_path)) is None
