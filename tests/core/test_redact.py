from __future__ import annotations

import pytest

from leanmill.core.redact import MASK, redact, redact_tree
from leanmill.core.secrets import is_secret


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    "secret",
    [
        "hf_" + "aB3" * 11,
        "f" * 20 + "0123456789" * 2,
        "wandb_v1_" + "Xy9_" * 10,
        "sk-proj-" + "a1B2" * 8,
        "ghp_" + "a1B2" * 9,
        "AKIA" + "ABCD1234" * 2,
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-DEF_123",
    ],
)
def test_keys_of_known_services_go(secret: str) -> None:
    assert redact(f"login with {secret}, please") == f"login with {MASK}, please"


def test_authorisation_goes_and_prose_stays() -> None:
    assert redact("Authorization: Bearer abc123.def456-x") == f"Authorization: Bearer {MASK}"
    assert redact("basic understanding of bearer certificates") == "basic understanding of bearer certificates"


def test_password_in_a_url_goes() -> None:
    assert redact("http://me:hunter22@proxy:3128/x") == f"http://{MASK}@proxy:3128/x"
    assert redact("https://example.org:8080/a@b") == "https://example.org:8080/a@b"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://h/x?token=abc", f"https://h/x?token={MASK}"),
        ("https://h/x?a=1&access_token=abc&b=2", f"https://h/x?a=1&access_token={MASK}&b=2"),
        ("https://h/x?accessToken=abc", f"https://h/x?accessToken={MASK}"),
        (
            "https://h?X-Amz-Credential=k&X-Amz-Signature=aa",
            f"https://h?X-Amz-Credential={MASK}&X-Amz-Signature={MASK}",
        ),
        ("https://h?AWSAccessKeyId=K&Signature=z", f"https://h?AWSAccessKeyId={MASK}&Signature={MASK}"),
        ("https://h/x?sv=1&sig=Zz%3D", f"https://h/x?sv=1&sig={MASK}"),
        ("https://h/#api_key=1", f"https://h/#api_key={MASK}"),
        ("https://abc@h/x", f"https://{MASK}@h/x"),
        ("https://me:p@ss@h/x", f"https://{MASK}@h/x"),
        ("s3://id:abc@bucket/x", f"s3://{MASK}@bucket/x"),
    ],
)
def test_credentials_in_a_url_go_and_are_refused_in_recipes(url: str, shown: str) -> None:
    assert redact(f"cannot read {url} now") == f"cannot read {shown} now"
    assert redact(redact(url)) == shown
    assert is_secret("path", url)
    assert not is_secret("path", shown)


@pytest.mark.parametrize(
    "url", ["ssh://git@h/x", "https://h/?author=me&page=3&monkey=1", "hf://datasets/o/x@main/a.parquet", "x?tokens=5"]
)
def test_harmless_parts_of_a_url_stay(url: str) -> None:
    assert redact(url) == url
    assert not is_secret("path", url)


def test_values_of_secret_environment_variables_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "open sesame")
    monkeypatch.setenv("STORE_SECRET_KEY", "open sesame and more")
    assert redact("said open sesame and more, then open sesame") == f"said {MASK}, then {MASK}"


def test_settings_with_harmless_values_stay(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsehood")
    monkeypatch.setenv("AUTH_ENABLED", "true")
    monkeypatch.setenv("SERVICE_CREDENTIALS", str(tmp_path))
    monkeypatch.setenv("KEYBOARD_LAYOUT", "us-international")
    text = f"falsehood is not true in {tmp_path} with us-international"
    assert redact(text) == text


def test_commits_and_longer_digests_stay() -> None:
    text = f"revision: {COMMIT}, fingerprint {'ab' * 32}"
    assert redact(text) == text
    assert redact_tree({"revision": COMMIT, "other": COMMIT}) == {"revision": COMMIT, "other": MASK}


def test_secret_fields_go_whatever_they_hold() -> None:
    tree = {
        "hf_token": "correct horse",
        "nested": [{"api_key": "battery staple"}],
        "pad_token": "<|endoftext|>",
        "tokens_per_step": 4096,
        "path": "org/model",
    }
    assert redact_tree(tree) == {**tree, "hf_token": MASK, "nested": [{"api_key": MASK}]}
