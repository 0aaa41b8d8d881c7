"""What counts as a credential."""

import pytest

from leanmill.trainer.checkpoint.redaction import REDACTED, redact


@pytest.mark.parametrize(
    "key",
    ["token", "hf_token", "HF_TOKEN", "api_key", "apikey", "wandb.api_key", "password", "client_secret", "auth",
     "aws_credentials", "secret_access_key"],
)  # fmt: skip
def test_secret_keys(key: str) -> None:
    assert redact({"a": [{key: "abc"}]}) == {"a": [{key: REDACTED}]}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokens_per_step", 32768), ("total_tokens", 5), ("tokenizer", "gpt2"), ("pad_token", "<pad>"),
        ("eos_token", "</s>"), ("hf_token", None), ("token", ""), ("author", "me"), ("key", "value"),
        ("path", "https://huggingface.co/a/b"), ("path", "hub_name/hf_model"),
    ],
)  # fmt: skip
def test_ordinary_settings_stay(key: str, value: object) -> None:
    assert redact({key: value}) == {key: value}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("https://me:pw@host/data", f"https://{REDACTED}@host/data"),
        ("https://ghs_x@host", f"https://{REDACTED}@host"),
        ("use hf_abcdefghijklmnopqrstuvwx", f"use {REDACTED}"),
        ("AKIAABCDEFGHIJKLMNOP", REDACTED),
        ("ghp_abcdefghijklmnopqrstuv", REDACTED),
        ("sk-abcdefghijklmnopqrstuv", REDACTED),
    ],
)
def test_secret_values_under_any_key(value: str, expected: str) -> None:
    assert redact({"path": value, "list": [value]}) == {"path": expected, "list": [expected]}
