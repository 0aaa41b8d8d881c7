"""Models drawn anew."""

import subprocess
import sys

import pytest
from transformers import AutoConfig

import leanmill.models.own_families  # noqa: F401


DRAW = """
from pathlib import Path
from leanmill.trainer.passes.rewind import draw
draw(Path({folder!r}), Path({out!r}), seed=0)
"""


@pytest.mark.slow
def test_a_family_of_our_own_is_drawn_in_a_process_that_has_not_seen_it(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "head_dim": 4, "vocab_size": 11, "num_attention_heads": 2}
    config = AutoConfig.for_model("pruned_llama", **sizes, intermediate_size_by_layer=[6, 0])
    config.save_pretrained(tmp_path / "in")
    code = DRAW.format(folder=str(tmp_path / "in"), out=str(tmp_path / "out"))
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert AutoConfig.from_pretrained(tmp_path / "out").intermediate_size_by_layer == [6, 0]
