"""Counts of rows and the words made of them."""

import json

import pytest

from leanmill.data.tally import FAR_ANSWER, NO_ANSWER, NO_MESSAGES, NO_TEXT, Tally


def tally(num_rows=9, num_other=0, **dropped):
    counts = Tally(num_rows, num_other)
    for reason, rows in dropped.items():
        for row in rows:
            counts.drop({"text": NO_TEXT, "answer": NO_ANSWER}[reason], row)
    counts.locate(lambda row: f"row {row} of a.jsonl")
    return counts


def test_the_line_says_every_count():
    assert tally().describe() == "rows: 9 read"
    counts = tally(1200, 3, text=[7, 5, 6], answer=[2])
    assert counts.describe() == "rows: 1,200 read, 3 held out, 3 without text, 1 without an assistant turn"


def test_warnings_name_the_first_row_and_the_remedy():
    (line,) = tally(text=[7, 5]).warnings("data", "column 'text'")
    assert line == (
        "2 of 9 rows of 'data' without text are left out, the first is row 5 of a.jsonl; fill column 'text', or set "
        "data.source.text_field to the column with the text"
    )
    assert tally().warnings("data", "column 'text'") == []


def test_state_survives_json():
    counts = tally(text=[3], answer=[1, 2])
    assert Tally.from_state(json.loads(json.dumps(counts.state()))) == counts


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        (tally(0), "'data' is empty"),
        (tally(3, 3), r"all 3 rows of 'data' are held out.*lower data\.source\.validation_fraction"),
        (tally(3, text=[1, 2], answer=[3]), "the first is row 1 of a.jsonl.*set data.source.text_field"),
        (tally(3, answer=[1, 2], text=[3]), "the first is row 1 of a.jsonl.*turn with role assistant"),
    ],
)
def test_nothing_left_is_blamed_on_the_most_frequent_reason(counts, expected):
    error = counts.nothing_left("data", "column 'text'")
    with pytest.raises(type(error), match=expected):
        raise error
    assert "\n" not in str(error)


@pytest.mark.parametrize("reason", [NO_TEXT, NO_MESSAGES, NO_ANSWER, FAR_ANSWER])
def test_every_reason_has_a_remedy(reason):
    counts = Tally(1)
    counts.drop(reason, 1)
    assert "; " in counts.warnings("data", "column 'x'")[0]
