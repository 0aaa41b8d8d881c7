"""The table at the end of a run with phases."""

import json

from leanmill.report.phases import table_of_phases


def write(folder, *records):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def scored(step, loss, tokens):
    return {
        "kind": "eval",
        "step": step,
        "tokens": tokens,
        "domains": {"all": {"loss": loss, "bits_per_byte": loss / 2}},
    }


def test_phases_stand_beside_each_other(tmp_path):
    teacher = write(tmp_path / "01-teacher", {"kind": "start", "num_parameters": 935040}, scored(40, 5.891, 40960))
    (tmp_path / "02-cut").mkdir()
    student = [{"kind": "start", "num_parameters": 398496}, scored(0, 5.9, 40960), scored(12, 5.8, 53248)]
    found = table_of_phases([teacher, tmp_path / "02-cut", write(tmp_path / "03-distil", *student)])
    assert found == [
        "phase       parameters  held-out loss, nats  bits/byte  tokens",
        "01-teacher     935,040                5.891      2.946  40,960",
        "03-distil      398,496       5.900 -> 5.800      2.900  53,248",
    ]
    assert table_of_phases([teacher]) == []
    assert table_of_phases([teacher, write(tmp_path / "04-broken", {"kind": "start", "num_parameters": 1})]) == []
