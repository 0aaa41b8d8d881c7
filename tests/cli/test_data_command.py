"""What `leanmill data preview` shows of rows."""

import json

import pytest
from rich.console import Console

from leanmill.cli import data_command
from leanmill.cli.main import main
from leanmill.data.preview import Piece, RowPreview


@pytest.fixture
def recipe(tmp_path):
    turns = [{"role": "user", "content": "why 1?"}, {"role": "assistant", "content": "so 1"}]
    lines = [{"prompt": f"why {n}?", "completion": f"so {n}"} for n in range(9)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{config: {{model_type: llama}}}}\ntrain: {{epochs: 1}}\ndata:\n  task: sft\n  sequence_length: 26\n"
        f"  source: {{type: hf, path: {tmp_path}/a.jsonl, validation_fraction: 0}}\n  tokenizer: {{vocab_size: 300}}\n"
        f"  cache_dir: {tmp_path}/cache\nbatch: {{tokens_per_step: 26, tokens_per_micro_batch: 26}}\n"
    )
    return str(path)


def test_documents_predictions_and_padding_are_told_apart(recipe, capsys):
    assert main(["data", "preview", recipe, "--rows", "2"]) == 0
    out = capsys.readouterr().out
    assert "9 documents, " in out
    assert "between « and »" in out
    first, second = out.split("row 0 of step 1: ")[1].split("row 1 of step 2: ")
    for row in (first, second):
        facts, *texts = row.strip().split("\n---- document ")
        number = int(facts.split(" documents, ")[0])
        assert number == 3
        assert "2 of padding" in facts
        assert len(texts) == number - 1
        assert row.count("«so ") == row.count("<|endoftext|>»") == number
        assert "«why" not in row


def test_one_conversation_fills_part_of_a_row(recipe, tmp_path, capsys):
    assert main(["data", "preview", recipe, "--rows", "1", f"data.source.path={tmp_path}/b.jsonl"]) == 0
    out = capsys.readouterr().out
    assert "row 0 of step 1: 1 document, " in out
    assert "<|user|>why 1?<|assistant|>«so 1<|endoftext|>»" in out


def test_every_training_phase_shows_its_rows_and_the_same_ones_once(recipe, tmp_path, capsys):
    phases = [
        {"name": "warm", "overrides": {"optimizer.lr": 1e-4}},
        {"name": "tune", "overrides": {"data.source.path": f"{tmp_path}/b.jsonl"}},
        {"name": "settle"},
    ]
    assert main(["data", "preview", recipe, "--rows", "1", f"phases={json.dumps(phases)}"]) == 0
    first, second = capsys.readouterr().out.split("phase tune\n")
    assert first.startswith("phases warm, settle\n")
    assert "row 0 of step 1: 3 documents, " in first
    assert first.count("row 0") == 1
    assert "row 0 of step 1: 1 document, " in second
    assert "«so 1<|endoftext|>»" in second


def test_a_terminal_gets_colours(capsys):
    pieces = [
        Piece(document=0, is_predicted=False, text="[why]"),
        Piece(document=0, is_predicted=True, text="so"),
        Piece(document=1, is_predicted=False, text="next"),
    ]
    row = RowPreview(pieces=pieces, num_documents=2, num_tokens=9, num_padding=0, num_predicted=2)
    console = Console(force_terminal=True, color_system="standard", highlight=False, width=80)
    data_command._show(console, 0, 1, row)
    out = capsys.readouterr().out
    assert "\x1b[2m[why]\x1b[0m\x1b[32mso\x1b[0m" in out
    assert "---- document 2 ----" in out
    assert "2 documents, 9 tokens, 2 predicted" in out
