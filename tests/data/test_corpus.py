"""The built-in corpus: over a made-up installation, and over the real one."""

import pytest

from leanmill.core.errors import ConfigError
from leanmill.data import corpus
from leanmill.data.config import LocalCorpus
from leanmill.data.corpus import corpus_domain, domain_max_bytes


DOCSTRING = "Words that explain. " * 20


@pytest.fixture
def installation(tmp_path, monkeypatch):
    """A standard library, a package folder and headers, of files written here."""
    stdlib, packages, include = (tmp_path / name for name in ("lib", "packages", "include"))
    for folder in ("lib/site-packages", "packages/pack/__pycache__", "packages/pack-1.dist-info", "include/c10"):
        (tmp_path / folder).mkdir(parents=True)
    for n in range(40):
        (stdlib / f"module_{n}.py").write_text(f'def f{n}():\n    """{n} {DOCSTRING}"""\n    return {n}\n')
    (stdlib / "site-packages" / "hidden.py").write_text("never = 'read'\n")
    (packages / "pack" / "__pycache__" / "x.py").write_text("never = 'read'\n")
    (packages / "pack" / "copy.py").write_text((stdlib / "module_3.py").read_text())
    (packages / "pack" / "latin.py").write_bytes("name = 'é'\n".encode("latin-1"))
    (packages / "pack" / "empty.py").write_text("")
    (packages / "pack-1.dist-info" / "METADATA").write_text("Name: pack\nVersion: 1\n\nA package that mills.\n")
    for n in range(9):
        (include / "c10" / f"h{n}.h").write_text(f"#define N{n} {n}\n")
    monkeypatch.setattr(corpus, "_installation", lambda: (str(stdlib), [str(packages)]))
    monkeypatch.setattr(corpus, "_torch_include", lambda: str(include))
    return tmp_path


def config(**settings):
    return LocalCorpus(**{"validation_fraction": 0.3, **settings})


def test_every_file_is_in_one_split_once(installation, tmp_path):
    text = corpus_domain(config(), "python", tmp_path / "cache")
    found = text.train + text.validation
    assert len(found) == 40
    assert len(set(found)) == 40
    assert text.validation
    assert len(text.train) > len(text.validation)
    assert not any("never" in document for document in found)
    assert text.num_skipped == 1


def test_order_does_not_follow_the_folders(installation, tmp_path, monkeypatch):
    first = corpus_domain(config(), "python", tmp_path / "a")
    walk = corpus._walk
    monkeypatch.setattr(corpus, "_walk", lambda *args, **kwargs: iter(list(walk(*args, **kwargs))[::-1]))
    second = corpus_domain(config(), "python", tmp_path / "b")
    assert first.train == second.train
    assert first.validation == second.validation
    assert first.train != sorted(first.train)


def test_english_is_descriptions_and_docstrings_split_with_their_files(installation, tmp_path):
    english = corpus_domain(config(), "english", tmp_path / "cache")
    python = corpus_domain(config(), "python", tmp_path / "cache")
    assert any("A package that mills." in d for d in english.train + english.validation)
    assert not any("Name: pack" in d for d in english.train + english.validation)
    held_out = "".join(python.validation)
    explained = [d for d in english.validation if "explain" in d]
    assert explained
    assert all(f'"""{d[:30]}' in held_out for d in explained)
    assert not any(f'"""{d[:30]}' in held_out for d in english.train)


def test_text_that_two_files_share_is_in_one_split(installation, tmp_path):
    shared = "The same words in every file, as licences have them. " * 5
    for n in range(20):
        (installation / "lib" / f"shared_{n}.py").write_text(f'def g{n}():\n    """{shared}"""\n')
    text = corpus_domain(config(), "english", tmp_path / "cache")
    assert sum("same words" in d for d in text.train + text.validation) == 1


def test_max_bytes_bounds_the_training_text(installation, tmp_path):
    text = corpus_domain(config(max_bytes=3000), "python", tmp_path / "cache")
    assert 1500 < sum(len(d.encode()) for d in text.train) <= 3000


def test_domains_get_bytes_by_weight():
    settings = LocalCorpus(max_bytes=1000, domains={"python": 2.0, "cpp": 0.5})
    assert domain_max_bytes(settings, "python") == 1000
    assert domain_max_bytes(settings, "cpp") == 250
    assert domain_max_bytes(LocalCorpus(max_bytes=None), "cpp") is None


def test_the_cache_follows_the_installation(installation, tmp_path):
    first = corpus_domain(config(), "cpp", tmp_path / "cache")
    (installation / "include" / "extra").mkdir()
    (installation / "include" / "extra" / "more.h").write_text("// one more\n")
    second = corpus_domain(config(), "cpp", tmp_path / "cache")
    assert first.text_fingerprint != second.text_fingerprint
    assert len(second.train + second.validation) == 10


def test_a_machine_without_the_text_says_what_to_change(installation, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_torch_include", lambda: None)
    with pytest.raises(ConfigError, match=r"no train text for the domain 'cpp'.*remove the domain"):
        corpus_domain(config(), "cpp", tmp_path / "cache")


def test_the_real_machine_has_all_three_domains(tmp_path):
    settings = LocalCorpus(max_bytes=300_000, validation_fraction=0.1)
    for domain in ("python", "cpp", "english"):
        text = corpus_domain(settings, domain, tmp_path)
        assert sum(len(d.encode()) for d in text.train) > 0.4 * domain_max_bytes(settings, domain)
        assert text.validation
        assert not set(text.train) & set(text.validation)
        again = corpus_domain(settings, domain, tmp_path)
        assert again == text
