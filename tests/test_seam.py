"""Nothing outside a technique's folder names what only that folder defines; facets are asked instead.

By names alone: an attribute that also something outside defines (`rank`, `weight`) cannot be told apart.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from leanmill.core.registry import PASSES, TECHNIQUES


PACKAGE = Path(__file__).parents[1] / "leanmill"
ROOMS = {entry.target.split(".")[1] for entry in (TECHNIQUES | PASSES).values()}
"""Kernels are not looked at: no technique's object reaches them."""
LIBRARIES = {
    "logits": "what transformers' models return",
    "groups": "what a match of a regular expression holds",
    "_disable_adapters": "where PEFT's layers keep whether they are off",
    "find_spec": "how Python finds a module",
    "init": "what starts a run of Weights & Biases",
    "accumulate": "what NumPy's functions of two numbers do along an array",
    "cache": "a decorator of functools",
    "library": "torch's registry of operators",
    **dict.fromkeys(("half", "linear", "mean"), "functions and dtypes of torch"),
    **dict.fromkeys(
        (
            "base_model_prefix",
            "generate",
            "get_input_embeddings",
            "get_output_embeddings",
            "_supports_flex_attn",
            "_supports_sdpa",
        ),
        "what transformers' models have",
    ),
    **dict.fromkeys(
        (
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "kv_lora_rank",
            "q_lora_rank",
            "qk_rope_head_dim",
        ),
        "sizes in transformers' configurations",
    ),
}
"""Attributes of other libraries that share their name with one of a technique."""
BRANCHES = "core/branches.py"
PEFT_NAMES = re.compile(r"\b(lora_(A|B|embedding_A|embedding_B|magnitude_vector|dropout)|base_layer|peft_config)\b")
_BY_NAME = {"getattr", "hasattr", "setattr", "delattr", "attrgetter"}
_REGISTER = {"register_buffer", "register_parameter", "register_module", "add_module"}


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


TREES = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def defined(tree: ast.AST) -> Iterator[str]:
    """Names that classes give their instances: methods, fields, what they assign to themselves or register."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield item.name
                targets = item.targets if isinstance(item, ast.Assign) else [getattr(item, "target", None)]
                yield from (target.id for target in targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                yield node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _REGISTER:
            yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant))


def used(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of every attribute that is read or written, by a dot or by its name as a string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in _BY_NAME:
                texts = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
                yield from ((node.lineno, part) for text in texts for part in text.split("."))


def only_of_techniques(trees: dict[Path, ast.AST]) -> set[str]:
    inside = {name for path, tree in trees.items() if _room(path) in ROOMS for name in defined(tree)}
    outside = {name for path, tree in trees.items() if _room(path) not in ROOMS for name in defined(tree)}
    return inside - outside - LIBRARIES.keys()


def found(trees: dict[Path, ast.AST], own: set[str]) -> list[str]:
    return [
        f"{path.relative_to(PACKAGE)}:{line} {name}"
        for path, tree in trees.items()
        if _room(path) not in ROOMS | {"kernels"} and str(path.relative_to(PACKAGE)) != BRANCHES
        for line, name in used(tree)
        if name in own
    ]


def test_nothing_outside_names_an_attribute_of_a_technique():
    assert found(TREES, only_of_techniques(TREES)) == []


def test_the_check_sees_what_it_should():
    own = only_of_techniques(TREES)
    assert {"decay_left", "teacher", "lora_A", "weight_bits"} <= own
    path = PACKAGE / "trainer/new.py"
    for line in (
        "x = stage.decay_left",
        "x.lora_A = 1",
        "hasattr(t, 'teacher')",
        "attrgetter('stage.decay_left')(x)",
    ):
        assert len(found({path: ast.parse(line)}, own)) == 1, line
    assert found({path: ast.parse("def f(decay_left): return decay_left")}, own) == []


def _texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Strings that are values, without docstrings, and identifiers."""
    documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
            yield node.lineno, node.value
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr


def test_one_file_outside_techniques_knows_the_names_of_peft():
    places = {
        str(path.relative_to(PACKAGE))
        for path, tree in TREES.items()
        if _room(path) not in ROOMS
        for _, text in _texts(tree)
        if PEFT_NAMES.search(text)
    }
    assert places == {BRANCHES}
