"""What a teacher's forward adds to the FLOPs of a token."""

import pytest

from leanmill.models.flops import flops_per_token
from leanmill.plan.plan import plan
from leanmill.trainer.frozen import frozen_flops_per_token
from tests.core.tiny import tiny
from tests.plan.test_plan import _recipe


def test_each_teacher_counts_once_and_forward_only(tmp_path):
    teacher = tiny(hidden_size=64)
    teacher.save_pretrained(tmp_path)
    one = {"type": "distill", "teacher": str(tmp_path)}
    recipe = _recipe("single", techniques=[one, one | {"divergence": "reverse_kl"}])
    forward = flops_per_token(teacher, recipe.data.sequence_length) / 3
    assert frozen_flops_per_token(recipe) == pytest.approx(forward)
    assert frozen_flops_per_token(_recipe("single")) == 0
    assert plan(recipe).flops_per_token == pytest.approx(plan(_recipe("single")).flops_per_token + forward)
