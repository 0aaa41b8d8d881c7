"""What a recipe may say of PEFT's methods, and what it is told otherwise."""

from __future__ import annotations

import subprocess
import sys

import pydantic
import pytest

from leanmill.core.errors import ConfigError
from leanmill.core.registry import parse_technique
from leanmill.peft_ext.peft.methods import METHODS, NOT_OPTIONS, REFUSED, REFUSED_OPTIONS
from leanmill.peft_ext.peft.options import option_names
from tests.core.tiny import install, tiny
from tests.peft_ext.peft.cases import raw_of


def test_options_are_pefts_own_fields():
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    for name, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        method = name.value.lower()
        if method in METHODS:
            fields = config.__dataclass_fields__.keys() - PeftConfig.__dataclass_fields__.keys()
            assert REFUSED_OPTIONS.get(method, {}).keys() <= fields
            assert option_names(method) == fields - NOT_OPTIONS.keys() - REFUSED_OPTIONS.get(method, {}).keys()


def test_options_stand_beside_the_method_or_below():
    flat = parse_technique({"type": "peft", "method": "vera", "r": 4, "d_initial": 0.2, "lr_factor": 3.0})
    nested = parse_technique({"type": "peft", "method": "vera", "options": {"r": 4, "d_initial": 0.2}, "lr_factor": 3})
    assert flat == nested
    assert flat.options == {"r": 4, "d_initial": 0.2}
    assert parse_technique(flat.model_dump(mode="json")) == flat


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"method": "vra"}, "peft.method=vra is unknown; did you mean vera"),
        ({"method": "zzzz"}, "known methods: beft, boft"),
        ({"method": 3}, "is no name"),
        ({"method": "vera", "d_init": 0.1}, "did you mean d_initial"),
        ({"method": "vera", "lora_alpha": 8}, "no option of method: vera; it belongs to lora.*set method: lora"),
        ({"method": "hra", "quatsch": 8}, "it has apply_GS, init_weights, r"),
        ({"method": "vera", "target_modules": ["q_proj"]}, "give peft.targets"),
        ({"method": "lora", "target_parameters": ["experts.up"]}, "type: lora"),
        ({"method": "lora", "modules_to_save": ["lm_head"]}, "trains adapters alone"),
        ({"method": "lora", "bias": "all"}, "type: perp"),
        ({"method": "lora", "eva_config": {}}, "needs activations of data"),
        ({"method": "lora", "init_lora_weights": "loftq"}, "needs data or another base; use true, gaussian"),
        ({"method": "core_lora", "variant": "lora_sb"}, "gradient_step is missing.*add e.g. gradient_step: 1e-3"),
        ({"method": "core_lora", "gradient_step": 0.1}, "belongs to method: core_lora with variant: lora_sb"),
        ({"method": "vera", "r": 4, "options": {"r": 5}}, "peft.r stands beside `method` and in peft.options"),
        *(({"method": name}, f"method={name} does not train here: .*use ") for name in REFUSED),
    ],
)
def test_what_is_refused_at_once(raw: dict, expected: str):
    with pytest.raises(pydantic.ValidationError, match=expected):
        parse_technique({"type": "peft", **raw})


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (raw_of("shira", r=10_000), "PEFT refuses these options for this model: The set rank 10000"),
        (raw_of("vera", r="four"), "PEFT refuses"),
        (raw_of("hra", targets=["q_prj"]), "matches no weight of this model; near names: q_proj"),
        (raw_of("ln_tuning", targets=["q_proj"]), "matches none of the norms"),
        (raw_of("ln_tuning", exclude=["*"]), "leaves no norm"),
        (raw_of("hira", r=4, exclude=["q_proj", "v_proj", "down_proj"]), "leave no weight"),
    ],
)
def test_what_is_refused_on_a_model(raw: dict, expected: str):
    with pytest.raises(ConfigError, match=expected) as error:
        install(tiny(), raw)
    assert "\n" not in str(error.value)


def test_stacked_experts_and_tied_tables_are_sent_elsewhere():
    with pytest.raises(ConfigError, match="stacked experts; add 'experts.*' to peft.exclude, or use `type: lora`"):
        install(tiny("mixtral"), {"type": "peft", "method": "vera", "r": 4})
    tied = tiny("llama", tie_word_embeddings=True)
    with pytest.raises(ConfigError, match="tied .*tie_word_embeddings: false"):
        install(tied, {"type": "peft", "method": "trainable_tokens", "token_indices": [1]})


def test_a_method_that_reads_the_weight_wants_it_plain():
    with pytest.raises(ConfigError, match=r"computes from the plain weight of .*q_proj, which ternary changes"):
        install(tiny(), raw_of("hra"), {"type": "ternary"})
    install(tiny(), raw_of("vera"), {"type": "ternary"})
    with pytest.raises(ConfigError, match="two techniques wrap layers"):
        install(tiny(), raw_of("vera"), {"type": "lora", "where": "branch"})


def test_reading_a_recipe_imports_no_torch():
    line = "from leanmill.core.registry import parse_technique as p; p({'type': 'peft', 'method': 'vera', 'r': 4});"
    line += "import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", line], check=False).returncode == 0
