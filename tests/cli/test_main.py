"""The command line as users meet it: exit codes, one line an error, fast starts."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from leanmill.cli.main import guarded, main
from leanmill.core.errors import ConfigError, RunError
from leanmill.core.registry import TECHNIQUES
from leanmill.recipe.schema import recipe_schema


ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")


@pytest.fixture
def call(capsys):
    def call(*args):
        code = main([str(a) for a in args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_check_explains_in_plain_words(call):
    code, out, err = call("check", QUICKSTART, "techniques.0.type=ternary", "--ranks", "2", "3")
    assert (code, err) == (0, "")
    for part in (
        "is valid",
        "on 2 ranks: one micro-batch",
        "on 3 ranks: impossible",
        "ternary (defaults)",
        "report.html",
    ):
        assert part in out


BAD = [
    (["check", "missing.yaml"], "no recipe at missing.yaml"),
    (["check", QUICKSTART, "train.stesp=3"], "did you mean 'steps'?"),
    (["check", QUICKSTART, "train.steps=x"], "train.steps='x' is not allowed"),
    (["check", QUICKSTART, "batch.tokens_per_step=100"], "no multiple"),
    (["check", QUICKSTART, "data.source={type: hf, path: ./nowhere.jsonl}"], "./nowhere.jsonl' does not exist"),
    (["check", QUICKSTART, "data.tokenizer.path=./nowhere"], "./nowhere' does not exist"),
    (["train", QUICKSTART, "checkpoint.resume=nowhere"], "checkpoint.resume='nowhere' does not exist"),
    (["train", "missing.yaml"], "no recipe at missing.yaml"),
    (["check", QUICKSTART, f"run_dir={QUICKSTART}"], "is a file; set run_dir to a folder that can"),
    (["train", QUICKSTART, f"run_dir={QUICKSTART}/below"], "is a file; set run_dir to a folder that can"),
    (["check", QUICKSTART, "techniques=[{type: distill, teacher: ./nowhere}]"], "techniques.0.teacher='./nowhere'"),
    (["check", "/dev/zero"], "so it is no recipe"),
    (["plan", QUICKSTART, "--gpus-per-node", "3"], "batch.tokens_per_step=1024 is no multiple"),
    (
        ["plan", QUICKSTART, "techniques.0={type: nm_sparsity, group_size: 5, num_kept: 2}"],
        "group_size 5 does not divide",
    ),
    (["plan", QUICKSTART, "techniques=[{type: ternary}, {type: ternary}]"], "the QUANT slot is taken by 'ternary'"),
    (["plan", QUICKSTART, "techniques=[{type: ternary, targets: [q_prj]}]"], "near names: q_proj"),
    (["check", QUICKSTART, "model.config.hiden_size=3"], "did you mean hidden_size"),
    (
        ["check", QUICKSTART, "model.config.intermediate_size=-352"],
        "intermediate_size=-352 is no size; give at least 1",
    ),
    (
        ["check", QUICKSTART, "techniques=[{type: lora, rank: 1e9}]"],
        "rank=1000000000.0 is not allowed; give a value less",
    ),
    (["check", QUICKSTART, "techniques=[{type: lora, rank: 200}]"], "set rank: 128 or less"),
    (
        ["check", QUICKSTART, "techniques=[{type: lora, rank: 200, where: branch}]"],
        "set rank: 128 or less",
    ),
    (
        ["check", QUICKSTART, "techniques=[{type: nm_sparsity, group_size: 5, num_kept: 2}]"],
        "group_size 5 does not divide",
    ),
    (["check", QUICKSTART, "techniques=[{type: ternary, targets: [q_prj]}]"], "near names: q_proj"),
    (["eval", "--checkpoint", "nowhere"], "no checkpoint at nowhere"),
    (["export", "--checkpoint", "nowhere", "--to", "hf", "--out", "x"], "no checkpoint at nowhere"),
    (["export", "--checkpoint", "x", "--to", "bitnets", "--out", "x"], "did you mean bitnet"),
    (["report", "nowhere"], "has no metrics.jsonl"),
]


@pytest.mark.parametrize(("args", "message"), BAD, ids=lambda v: " ".join(v)[:60] if isinstance(v, list) else None)
def test_bad_input_is_one_line_and_exit_2(call, args, message):
    code, out, err = call(*args)
    assert code == 2
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def test_a_read_only_run_dir_is_refused_before_anything_starts(call, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    code, _, err = call("train", QUICKSTART, f"run_dir={tmp_path}/new/run")
    assert code == 2
    assert f"{tmp_path} is read-only for this user; set run_dir to a folder that can, e.g. run_dir=runs/" in err
    assert not list(tmp_path.iterdir())


def test_two_problems_are_two_lines(call):
    code, _, err = call("check", QUICKSTART, "train.stesp=3", "log.wnadb=true")
    assert code == 2
    assert [line.startswith("error: ") for line in err.splitlines()] == [True, True]


def test_debug_shows_the_traceback(call):
    code, _, err = call("check", "missing.yaml", "--debug")
    assert code == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: no recipe")


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (ConfigError("bad"), 2, "error: bad"),
        (RunError("full disk"), 1, "error: full disk"),
        (
            OSError(28, "No space left on device", "/x"),
            1,
            "error: No space left on device: /x; free space there, or write to another folder",
        ),
        (ValueError("odd\nthing"), 1, "error: ValueError: odd thing (add --debug for the traceback)"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
    ],
)
def test_exit_codes(monkeypatch, call, raised, code, line):
    def fail(args):
        raise raised

    monkeypatch.setattr("leanmill.cli.methods_command.run", fail)
    assert call("methods") == (code, "", line + "\n")


def test_a_checkpoint_being_written_does_not_hold_up_the_second_ctrl_c(monkeypatch, call, capsys):
    """Nothing after `os._exit` runs, so neither does the interpreter's wait for the thread that writes."""

    class Left(BaseException):
        pass

    def interrupt(recipe):
        raise KeyboardInterrupt

    def leave(code):
        raise Left(code)

    monkeypatch.setattr("leanmill.trainer.run.run", interrupt)
    monkeypatch.setattr("os._exit", leave)
    with pytest.raises(Left, match="130"):
        call("train", QUICKSTART)
    assert capsys.readouterr().err.endswith("error: interrupted\n")


def test_other_ranks_say_who_they_are(monkeypatch, call):
    def fail(args):
        raise RunError("full disk")

    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr("leanmill.cli.methods_command.run", fail)
    assert call("methods")[2] == "[rank 3] error: full disk\n"


def test_a_bad_recipe_is_said_once_a_machine(monkeypatch, call):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert call("train", "missing.yaml") == (2, "", "")


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["nonsense"],
        ["check"],
        ["plan", QUICKSTART, "--nodes", "0"],
        ["plan", QUICKSTART, "--nodes", "²"],
        ["plan", QUICKSTART, "--rank-memory-gib", "nan"],
        ["plan", QUICKSTART, "--rank-memory-gib", "-5"],
        ["plan", QUICKSTART, "--rank-memory-gib", "much"],
        ["methods", "x=1"],
    ],
)
def test_usage_errors_exit_2(args, capsys):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_python_m_leanmill_is_the_command():
    done = subprocess.run([sys.executable, "-m", "leanmill", "methods"], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in TECHNIQUES)


def test_a_terminal_without_the_letters_of_a_name_shows_their_codes():
    args = [sys.executable, "-m", "leanmill", "check", QUICKSTART, "name=ü", "model.path=org/name", "model.config=null"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(args, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    assert r"recipe '\xfc' is valid" in done.stdout


def test_methods_lists_every_technique_with_paper_and_home(call):
    code, out, _ = call("methods")
    assert code == 0
    for name, entry in TECHNIQUES.items():
        assert name in out
        assert entry.paper in out


def test_schema_refers_to_nothing_that_is_not_there():
    text = json.dumps(recipe_schema())
    definitions = json.loads(text)["$defs"]
    assert set(re.findall(r'"#/\$defs/([^"]+)"', text)) <= set(definitions)
    assert "drop" in json.dumps(definitions["EvoPress"]["properties"]["levels"])


def test_schema_describes_every_technique(call, tmp_path):
    code, out, _ = call("schema")
    schema = json.loads(out)
    assert code == 0
    items = schema["properties"]["techniques"]["items"]
    assert set(items["discriminator"]["mapping"]) == set(TECHNIQUES)
    for reference in items["discriminator"]["mapping"].values():
        technique = schema["$defs"][reference.rsplit("/", 1)[1]]
        assert "type" in technique["required"]
        # Options of PEFT's methods stand beside its own.
        assert technique["additionalProperties"] is reference.endswith("/Peft")
        for name, field in technique["properties"].items():
            assert name == "type" or field.get("description"), (reference, name)
    engine = schema["properties"]["engine"]
    assert "fsdp" in engine["then"]["enum"]
    assert "fsdp" in engine["else"]["discriminator"]["mapping"]
    out_file = tmp_path / "schema.json"
    assert call("schema", "--out", out_file)[0] == 0
    assert json.loads(out_file.read_text()) == schema


def test_schema_accepts_the_recipes_and_refuses_typos():
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(recipe_schema())
    for path in (ROOT / "recipes").glob("*.yaml"):
        validator.validate(yaml.safe_load(path.read_text()))
    good = yaml.safe_load(Path(QUICKSTART).read_text())
    assert validator.is_valid(good | {"optimizer": {"lr": "3e-3"}})  # what YAML 1.1 makes of lr: 3e-3
    bad = good | {"techniques": [{"type": "lora", "rnk": 3}]}
    assert "'rnk' was unexpected" in jsonschema.exceptions.best_match(validator.iter_errors(bad)).message
    assert not validator.is_valid(good | {"optimizer": {"lr": "fast"}})


def test_the_schema_has_a_type_choose_what_is_checked():
    schema = recipe_schema()
    lr = schema["$defs"]["AdamW"]["properties"]["lr"]
    assert lr["type"] == ["number", "string"]
    assert re.search(lr["pattern"], "3e-3")
    assert not re.search(lr["pattern"], "fast")
    techniques = schema["properties"]["techniques"]["items"]
    chosen = {rule["if"]["properties"]["type"]["const"]: rule["then"]["$ref"] for rule in techniques["allOf"]}
    assert chosen == techniques["discriminator"]["mapping"]
    assert set(chosen) == set(techniques["properties"]["type"]["enum"])
    assert "type" not in schema["$defs"]["AdamW"]["required"]  # `optimizer: {lr: 3e-3}` is AdamW
    assert "type" in schema["$defs"]["Lion"]["required"]


def test_plan_prints_json(call):
    code, out, _ = call(
        "plan", QUICKSTART, "--gpus-per-node", "2", "--json", "train.steps=5", "train.total_tokens=null"
    )
    values = json.loads(out)
    assert code == 0
    assert (values["world_size"], values["num_steps"]) == (2, 5)


def test_plan_prints_tables(call):
    code, out, _ = call("plan", QUICKSTART)
    assert code == 0
    for part in ("optimizer state", "active for a token", "FLOPs of the run", "peak"):
        assert part in out


@pytest.mark.parametrize(
    ("args", "forbidden"),
    [
        (["--help"], {"torch", "pydantic", "yaml", "transformers", "rich"}),
        (["methods"], {"torch", "transformers", "yaml"}),
        (["schema"], {"torch", "transformers"}),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else None,
)
def test_fast_verbs_import_nothing_heavy(args, forbidden):
    assert not forbidden & imported(args)


@pytest.mark.parametrize("recipe", ["quickstart", "sparse_finetune"])
def test_a_check_imports_torch_once_a_model(call, tmp_path, monkeypatch, recipe):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = ["check", str(ROOT / "recipes" / f"{recipe}.yaml"), "techniques.0.type=nm_sparsity"]
    assert call(*args)[0] == 0  # is remembered, or the model is not here to be built
    again = [*args, "train.steps=3", "train.total_tokens=null", "optimizer.lr=1e-5"]
    assert call(*again)[0] == 0
    assert not {"torch", "transformers", "deepspeed", "peft"} & imported(again)


def test_a_check_says_what_it_did_not_check(call):
    out = call("check", str(ROOT / "recipes" / "sparse_finetune.yaml"))[1]
    for line in (
        "not checked  model Qwen/Qwen3-0.6B and whether the techniques fit it: it is not on this machine",
        "techniques.1.teacher Qwen/Qwen3-0.6B: it is not on this machine",
        "the rows of HuggingFaceFW/fineweb-edu",
    ):
        assert line in out
    assert "not checked" not in call("check", QUICKSTART)[1]


def imported(args):
    """Modules of a process of the command: what start-up costs, whatever else the machine is doing."""
    code = (
        "import sys\nfrom leanmill.cli.main import main\n"
        f"try:\n    main({args!r})\nexcept SystemExit:\n    pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stderr.split())


def test_an_output_that_exists_is_refused_before_anything_heavy_is_imported(tmp_path):
    checkpoint, out = tmp_path / "step-00000001", tmp_path / "out"
    for folder, file in ((checkpoint, "manifest.json"), (out, "weights.bin")):
        folder.mkdir()
        (folder / file).write_text("{}")
    script = (
        "import sys\nfrom leanmill.cli.main import main\n"
        f"code = main(['export', '--checkpoint', {str(checkpoint)!r}, '--to', 'hf', '--out', {str(out)!r}])\n"
        "assert code == 2, code\nassert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"error: {out} exists already; give a new folder as the output, or remove it\n"


URL = "https://host/x?token=correcthorse"
ECHOED = [
    ["check", URL],
    ["check", QUICKSTART, URL],
    ["check", QUICKSTART, f"train.steps={URL}"],
    ["check", QUICKSTART, f"data.source={URL}"],
    ["check", QUICKSTART, f"data.source.type={URL}"],
    ["check", QUICKSTART, f"data.source={{type: hf, path: '{URL}'}}"],
    ["check", QUICKSTART, f"model={{path: '{URL}'}}"],
    ["check", QUICKSTART, f"name={URL}"],
    ["check", QUICKSTART, f"run_dir={URL}"],
    ["check", QUICKSTART, f"unknown={URL}"],
    ["check", QUICKSTART, f"model.path.{URL}.a=b"],
    ["plan", QUICKSTART, "--nodes", URL],
    ["train", QUICKSTART, f"checkpoint.resume={URL}"],
    ["eval", "--checkpoint", URL],
    ["export", "--checkpoint", "x", "--to", URL, "--out", "x"],
    ["report", URL],
    ["report", "x", f"--{URL}"],
]


@pytest.mark.parametrize("arguments", ECHOED)
@pytest.mark.parametrize("debug", [False, True])
def test_no_message_echoes_a_credential_of_a_url(arguments, debug, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(SystemExit):  # argparse's own refusals
        assert main([*arguments, *(["--debug"] if debug else [])]) != 0
    captured = capsys.readouterr()
    assert captured.err
    assert "correcthorse" not in captured.out + captured.err
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize(
    ("module", "extra"), [("deepspeed.ops", "deepspeed"), ("torchao", "lowbit"), ("gguf", "formats")]
)
def test_a_missing_package_is_named_with_what_installs_it(module, extra, capsys):
    def action():
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    assert guarded(action, debug=False) == 1
    assert f"pip install 'leanmill[{extra}]'" in capsys.readouterr().err
