import json

import pytest
import yaml

from leanmill.core.errors import ConfigError
from leanmill.recipe.io import apply_override, load_recipe, resolved_yaml, validate_recipe
from leanmill.recipe.root import Recipe
from leanmill.recipe.rules import LENGTHS, known_steps, with_length_in_tokens


MODEL = {"model_type": "llama", "hidden_size": 64}


@pytest.fixture
def write(tmp_path):
    def write(text, name="r.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture
def load(write):
    """Load a small valid recipe with overrides."""
    path = write("model: {config: {model_type: llama}}\ntrain: {steps: 3}\n")
    return lambda *overrides: load_recipe(path, overrides)


def test_round_trips_through_yaml_and_json_are_exact(load, write):
    recipe = load(
        "optimizer={type: lion, lr: 3e-4, lookahead: {every: 6}}",
        "engine={type: fsdp, shard_size: 2}",
        "techniques=[{type: nm_sparsity, group_size: 8}, {type: lora, rank: 3, where: branch}]",
        "data.source={type: mixture, sources: [{type: local_corpus}, {type: hf, path: a.jsonl, weight: 0.3}]}",
        "train.logits_chunk_tokens=7",
        "schedule.warmup_steps=5",
    )
    again = load_recipe(write(resolved_yaml(recipe), "again.yaml"))
    assert again == recipe
    assert [type(t) for t in again.techniques] == [type(t) for t in recipe.techniques]
    assert validate_recipe(json.loads(json.dumps(recipe.model_dump(mode="json")))) == recipe
    assert resolved_yaml(again) == resolved_yaml(recipe)
    assert again.techniques[1].rank == 3


def test_floats_without_a_dot_are_numbers(write):
    recipe = load_recipe(write("model: {config: {model_type: llama, rope_theta: 1e6}}\ntrain: {steps: 3}\n"))
    assert recipe.model.config["rope_theta"] == 1e6
    assert recipe.model.config["rope_theta"].__class__ is float


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("train.steps=7", lambda r: r.train.steps == 7),
        ("optimizer.lr=2e-4", lambda r: r.optimizer.lr == 2e-4),
        ("engine=ddp", lambda r: r.engine.type == "ddp"),
        ("engine.type=fsdp", lambda r: r.engine.type == "fsdp"),
        ("techniques.0.type=ternary", lambda r: r.techniques[0].type == "ternary"),
        ("model.config.num_hidden_layers=3", lambda r: r.model.config["num_hidden_layers"] == 3),
        ("train.max_grad_norm=", lambda r: r.train.max_grad_norm is None),
        ("name=a=b", lambda r: r.name == "a=b"),
        ("eval.every_steps=null", lambda r: r.eval.every_steps is None),
        ("log.wandb=true", lambda r: r.log.wandb),
    ],
)
def test_overrides(write, override, read):
    path = write("model: {config: {model_type: llama}}\ntrain: {steps: 3}\noptimizer: {type: adamw}\nengine: auto\n")
    assert read(load_recipe(path, [override]))


def test_override_indexes_and_appends():
    raw = {"techniques": [{"type": "ternary"}], "engine": "fsdp"}
    apply_override(raw, "techniques.0.scale=mse")
    apply_override(raw, "techniques.1.type=lora")
    apply_override(raw, "techniques.1.rank=2")
    apply_override(raw, "engine.shard_size=2")
    assert raw["techniques"] == [{"type": "ternary", "scale": "mse"}, {"type": "lora", "rank": 2}]
    assert raw["engine"] == {"type": "fsdp", "shard_size": 2}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "not of the form a.b=value"),
        ("=3", "not of the form"),
        ("a..b=3", "not of the form"),
        ("techniques.2.type=ternary", "'2' is no place in a list of 0"),
        ("train.steps.more=1", "train.steps is the plain value 3"),
        ('name="a', "the value is not YAML"),
        ("techniques.²=3", "'²' is no place in a list of 0"),
        (".".join("abcdefghijklmnopqrstuvwxyz") + "=1", "has 26 levels; a recipe needs about six"),
        ("train.steps=" + "[" * 3000, "more than 20 levels of nesting"),
        ("hf_token=[abcdef", "override <hidden>: the value is not YAML"),
        ("name=[a", "the value is not YAML"),
    ],
)
def test_bad_overrides(load, override, message):
    with pytest.raises(ConfigError) as error:
        load("techniques=[]", override)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("trian.steps=3", ["unknown key trian", "did you mean 'train'?"]),
        ("train.precison=bf16", ["unknown key train.precison", "did you mean 'precision'?"]),
        ("engine={type: fsdp, shards_size: 3}", ["unknown key engine.shards_size", "did you mean 'shard_size'?"]),
        ("engine={type: fdsp}", ["engine.type='fdsp'", "known types: auto, single, ddp, fsdp", "did you mean 'fsdp'"]),
        ("optimizer={type: sgd}", ["optimizer.type='sgd'", "adamw, lion, adamw8bit"]),
        ("data.source={path: x}", ["data.source needs a `type`", "local_corpus, hf, prepared, mixture"]),
        ("data.source={type: hf}", ["data.source.path is missing", "Hub name, file, folder or glob"]),
        ("train.precision=fp16", ["train.precision='fp16'", "'fp32' or 'bf16'"]),
        ("train.steps=many", ["train.steps='many' is not allowed", "a valid integer"]),
        ("train.steps=0", ["train.steps=0", "greater than or equal to 1", "optimizer steps"]),
        ("train.logits_chunk_tokens=x", ["a valid integer or 'auto'"]),
        ("batch=5", ["batch=5 is not allowed"]),
        ("techniques=ternary", ["techniques='ternary'", "list"]),
        ("techniques=[ternary]", ["techniques.0", "{type: ternary}"]),
        ("techniques=[{type: ternry}]", ["unknown technique type 'ternry'", "did you mean ternary"]),
        ("techniques=[{type: lora, rnk: 3}]", ["unknown key techniques.0.rnk", "did you mean 'rank'?"]),
        ("techniques=[{type: lora, rank: 0}]", ["techniques.0.rank=0", "greater than or equal to 1"]),
        (
            "techniques=[{type: nm_sparsity, num_kept: 4}]",
            ["techniques.0", "num_kept 4 of group_size 4 prunes nothing"],
        ),
        ("model={}", ["exactly one of model.config", "neither"]),
        ("model.path=org/name", ["exactly one of model.config", "both", "model.config=null"]),
        ("model.config={hidden_size: 3}", ["model_type"]),
        ("train={steps: 3, total_tokens: 5}", ["train.total_tokens=5 and train.steps=3 are both given"]),
        ("train.epochs=0", ["train.epochs=0", "greater than 0", "passes over the training data"]),
        ("train.steps=null", ["train.total_tokens (tokens) or train.steps"]),
        ("data.sequence_length=1000", ["tokens_per_micro_batch=4096 is no multiple", "=4000 or 5000"]),
        ("batch.tokens_per_step=9000", ["tokens_per_step=9000 is no multiple", "=8192 or 12288"]),
        ("model.config.max_position_embeddings=512", ["data.sequence_length=1024 is longer", "sequence_length=512"]),
        ("model.max_context=100", ["model.max_context=100"]),
        ("data.task=sft", ["local_corpus has none", "data.task=pretrain"]),
        ("engine={type: deepspeed, stage: 0, offload_optimizer: {device: cpu}}", ["offload_optimizer needs stage 1"]),
        ("engine={type: deepspeed, stage: 2, offload_parameters: {device: cpu}}", ["needs stage 3", "engine.stage=3"]),
        ("engine={type: deepspeed, stage: 3, offload_parameters: {device: nvme}}", ["nvme needs a directory", "path:"]),
        ("engine={type: deepspeed, offload_optimizer: {device: cpu, path: /x}}", ["only for device nvme"]),
        ("schedule.warmup_steps=3.5", ["schedule.warmup_steps=3.5"]),
        ("run_dir=a/{b}", ["run_dir='a/{b}'", "{name}"]),
        ("name=a/b", ["name='a/b'"]),
        ("eval.tokens_per_domain=10", ["eval.tokens_per_domain=10 is less than one row"]),
        ("train.cross_entropy_weight=0", ["leaves no loss"]),
        (
            "techniques=[{type: lora, where: branch}, {type: lora, where: branch, rank: 4}]",
            ["lora and lora both wrap layers with output branches", "where: weight"],
        ),
        ("optimizer={type: adamw, lr: .nan}", ["optimizer.lr=nan", "finite"]),
        ("techniques=[{type: null}]", ["techniques.0", "is a name, got nothing", "known types: nm_sparsity"]),
        ("techniques=[{type: [a]}]", ["techniques.0", "is a name, got a list", "known types: nm_sparsity"]),
        ("techniques=[null]", ["techniques.0", "got nothing", "{type: ternary}"]),
        ("engine={type: [a]}", ["engine.type=['a'] is unknown; known types: auto"]),
        ("optimizer.LR=1", ["unknown key optimizer.LR; did you mean 'lr'?"]),
        ("optimizer.weight-decay=1", ["did you mean 'weight_decay'?"]),
        ("optimizer.betas=[1, 0.9]", ["optimizer.betas.0=1 is not allowed; give a value less than 1"]),
        (
            "optimizer={type: lion, lr: 0.1, weight_decay: 10}",
            ["lr=0.1 x weight_decay=10", "set optimizer.weight_decay below 10"],
        ),
        ("optimizer.betas=3", ["optimizer.betas=3 is not allowed; give a list"]),
        ("eval=5", ["eval=5 is not allowed; give a mapping of every_steps, at_start, tokens_per_domain"]),
        ("engine=[ddp]", ["engine=['ddp'] is not allowed; give a mapping of a type and its keys"]),
        (
            "data.source={type: local_corpus, domains: {rust: 1}}",
            ["unknown key data.source.domains.rust", "python, cpp"],
        ),
        ("data.source={type: local_corpus, domains: {}}", ["domains={} is not allowed; give at least 1 of them"]),
        ("1=2", ["unknown key 1; known keys: name"]),
        ("log.wandb=maybe", ["log.wandb='maybe' is not allowed; give true or false"]),
        ("name=5", ["name=5 is not allowed; give text"]),
        ("run_dir=''", ["run_dir='' is no folder", "run_dir: runs/{name}"]),
        ("run_dir=", ["run_dir=None is not allowed; give text"]),
        (
            "checkpoint.remote='s3://b/{run}'",
            ["checkpoint.remote='s3://b/{run}' may contain", "s3://bucket/runs/{name}"],
        ),
        ("run_dir='{name.x}'", ["run_dir='{name.x}' may contain", "{name}"]),
        (r'name="a\nb"', ["must be one line", "shorten it"]),
        ("name=" + "n" * 300, ["must be one line, names of at most 200 bytes; shorten it"]),
        ("seed=9223372036854775808", ["beyond 64 bits; give a smaller one"]),
    ],
)
def test_one_line_a_problem_with_the_remedy(load, override, parts):
    with pytest.raises(ConfigError) as error:
        load(override)
    lines = str(error.value).splitlines()
    assert len(lines) == 1, lines
    for part in parts:
        assert part in lines[0]


def test_every_problem_gets_its_own_line_with_its_line_number(write):
    path = write(
        "model: {config: {model_type: llama}}\ntrain:\n  steps: 0\n  precison: x\nbatch: {}\nlog:\n  wnadb: true\n"
    )
    with pytest.raises(ConfigError) as error:
        load_recipe(path)
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert {line.split(":")[0].rsplit(" ", 1)[1] for line in lines} == {"3", "4", "7"}
    assert all(str(path) in line for line in lines)


def test_a_value_that_an_override_gave_is_named_by_it(write):
    path = write("model: {config: {model_type: llama}}\ntrain:\n  steps: 0\n  max_grad_norm: 0\n")
    with pytest.raises(ConfigError) as error:
        load_recipe(path, ["train.steps=-1"])
    assert [line.split(": ")[0] for line in str(error.value).splitlines()] == [
        "override 'train.steps=-1'", f"{path} line 4"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "front"),
    [
        (["data.source={type: hf}"], "override 'data.source={type: hf}'"),  # a key that is missing in it
        (["techniques=[{type: lora}]", "techniques.0.rnk=3"], "override 'techniques.0.rnk=3'"),
        (["batch.tokens_per_step=9000"], "override 'batch.tokens_per_step=9000'"),  # what does not fit another section
        (["data.sequence_length=1000", "seed=3"], "override 'data.sequence_length=1000'"),
        (["train.steps=3", "train.epochs=2"], "overrides 'train.epochs=2', 'train.steps=3'"),
        (["model.path=org/name", "seed=3"], "r.yaml line 1"),  # the line about both names the file's section
        (["hf_token=abcdef"], "override <hidden>"),
    ],
)
def test_errors_name_the_override_that_made_them(write, overrides, front):
    path = write("model: {config: {model_type: llama}}\ntrain: {steps: 3}\n")
    with pytest.raises(ConfigError) as error:
        load_recipe(path, overrides)
    assert str(error.value).splitlines()[0].removeprefix(f"{path.parent}/").startswith(f"{front}: ")


@pytest.mark.parametrize("override", ["train.steps=7", "train.total_tokens=5000", "train.epochs=0.5"])
@pytest.mark.parametrize("given", ["steps: 3", "total_tokens: 9", "epochs: 2"])
def test_an_override_of_the_length_takes_the_place_of_the_files(write, given, override):
    path = write(f"model: {{config: {{model_type: llama}}}}\ntrain: {{{given}}}\n")
    train = load_recipe(path, [override]).train
    key, _, value = override.removeprefix("train.").partition("=")
    lengths = {name: getattr(train, name) for name in LENGTHS}
    assert {name: value for name, value in lengths.items() if value is not None} == {key: float(value)}


def test_dropping_a_length_leaves_its_siblings(write):
    path = write("model: {config: {model_type: llama}}\ntrain: {steps: 3, total_tokens: 9}\n")
    assert load_recipe(path, ["train.steps=null"]).train.total_tokens == 9


def test_a_phase_may_be_given_another_length(write):
    path = write(
        "model: {config: {model_type: llama}}\ntrain: {epochs: 2}\nphases: [{overrides: {train: {total_tokens: 9}}}]\n"
    )
    recipe = load_recipe(path, ["phases.0.overrides.train.steps=4"])
    assert recipe.of_phase(0).train.steps == 4
    assert recipe.of_phase(0).train.total_tokens is None


def test_epochs_need_data_of_known_length(load):
    source = "data.source={type: mixture, sources: [{type: local_corpus}, {type: hf, path: a.jsonl, streaming: true}]}"
    with pytest.raises(ConfigError, match=r"train.epochs=2 needs to know how much text there is, and 'data' is"):
        load("train.epochs=2", source)


def test_epochs_become_tokens_once_the_rows_are_known(load):
    recipe = load("train.epochs=1.5", "data.sequence_length=512")
    assert known_steps(recipe) is None
    resolved = with_length_in_tokens(recipe, rows_per_epoch=33)
    assert (resolved.train.epochs, resolved.train.total_tokens) == (None, 50 * 512)  # half a row is a row
    assert known_steps(resolved) == 1
    assert with_length_in_tokens(load(), rows_per_epoch=33) == load()


def test_an_override_of_an_aliased_section_leaves_the_other_alone(write):
    path = write(
        "model: {config: {model_type: llama}}\ntrain: {steps: 3}\neval: &every {every_steps: 4}\nlog: *every\n"
    )
    recipe = load_recipe(path, ["eval.every_steps=9"])
    assert (recipe.eval.every_steps, recipe.log.every_steps) == (9, 4)


def test_keys_that_yaml_reads_as_something_else_are_named_as_written(write):
    with pytest.raises(ConfigError) as error:
        load_recipe(write("model: {config: {model_type: llama}}\ntrain: {steps: 3}\n1: 2\non: 3\n~: 4\n"))
    assert [line.split(": ", 1)[1].split(";")[0] for line in str(error.value).splitlines()] == [
        "unknown key 1",
        "unknown key on",
        "unknown key ~",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a: " + b"x" * 300_000, "more than 262,144 bytes, so it is no recipe"),
        (b"", "is empty"),
        (b"# only a comment\n", "is empty"),
        (b"name: caf\xe9\n", "not UTF-8"),
        (b"a: [1\nb: 2\n", "line 2"),
        (b"a: 1\n\tb: 2\n", "not a YAML recipe"),
        (b"- a\n- b\n", "holds a list"),
        (b"just text\n", "holds a str"),
        (b"train: {steps: 1}\ntrain: {steps: 2}\n", "line 2, column 1: not a YAML recipe: key 'train' is given twice"),
        (b"a: !!python/object/apply:os.system [ls]\n", "is not for recipes; remove it"),
        (b"a: 1\n---\nb: 2\n", "not a YAML recipe"),
        (b"? [a]\n: 1\n", "keys must be plain words"),
        (b"a: \x00\n", "not a YAML recipe"),
    ],
)
def test_files_that_are_no_recipe(write, text, message):
    with pytest.raises(ConfigError) as error:
        load_recipe(write(text))
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_missing_file_names_a_near_one(write, tmp_path):
    write("a: 1", "pretrain.yaml")
    with pytest.raises(ConfigError, match=r"did you mean .*pretrain\.yaml"):
        load_recipe(tmp_path / "pretrian.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_recipe(tmp_path)


TOKEN = "hf_" + "abcdefghij" * 3


@pytest.mark.parametrize(
    "override",
    [
        f"model.config.hf_token={TOKEN}",
        f"hf_token={TOKEN}",
        f"name={TOKEN}",
        "data.source={type: hf, path: 'https://user:pa55word@host/data.jsonl'}",
        "model.config.api_key=pa55word",
    ],
)
def test_credentials_are_refused_and_never_shown(load, override):
    with pytest.raises(ConfigError) as error:
        load(override)
    assert "credential" in str(error.value)
    assert TOKEN not in str(error.value)
    assert "pa55word" not in str(error.value)
    assert error.value.__suppress_context__  # a traceback would print the input


def test_keys_of_model_configs_are_no_credentials(load):
    recipe = load("model.config.pad_token_id=3", "model.config.image_token='<image>'")
    assert recipe.model.config["pad_token_id"] == 3


def test_python_callers_meet_the_same_rules():
    with pytest.raises(ValueError, match=r"train\.total_tokens"):
        Recipe(model={"config": MODEL})


def test_resolved_yaml_writes_defaults_out(load):
    values = yaml.safe_load(resolved_yaml(load()))
    assert values["train"]["precision"] == "auto"
    assert values["engine"] == {"type": "auto", "staging": "auto"}
