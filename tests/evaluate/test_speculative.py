"""Acceptance by real assisted generation, against proposals and comparisons one after another."""

from types import SimpleNamespace

import pytest
import torch

from leanmill.core.errors import ConfigError
from leanmill.data.config import DataConfig
from leanmill.evaluate import speculative
from leanmill.evaluate.models import Opened
from leanmill.recipe.evaluate import Speculative
from tests.core.tiny import VOCAB_SIZE, tiny, tokens
from tests.evaluate.parrots import asked


TOKENIZER = SimpleNamespace(eos_token_id=None)


def config_of(**settings):
    sizes = {"num_prompts": 3, "prompt_tokens": 7, "new_tokens": 17, "num_proposed": 3}
    return Speculative(type="speculative", target="t", **{**sizes, **settings})


def likeliest(model, text):
    with torch.no_grad():
        return model(input_ids=text[None]).logits[0].argmax(-1)


def by_hand(target, draft, prompt, num_proposed, new_tokens):
    """Propose, compare and go on, without caches."""
    text, proposed, forwards, room = prompt[0], 0, 0, prompt.shape[1] + new_tokens
    while len(text) < room:
        given = text
        for _ in range(min(num_proposed, room - len(text) - 1)):
            given = torch.cat([given, likeliest(draft, given)[-1:]])
        wanted, start = likeliest(target, given), len(text)
        kept = start
        while kept < len(given) and given[kept] == wanted[kept - 1]:
            kept += 1
        proposed, forwards = proposed + len(given) - start, forwards + 1
        text = torch.cat([given[:kept], wanted[kept - 1 : kept]])
    return text, proposed, forwards


def alike(scale):
    """A target, and a draft whose head is a little off, so that it is right now and then."""
    target, draft = tiny(seed=3).eval(), tiny(seed=3).eval()
    with torch.no_grad():
        draft.lm_head.weight.add_(torch.randn(draft.lm_head.weight.shape) * scale)
    return target, draft


def test_greedy_counts_and_text_are_those_of_proposals_one_by_one():
    target, draft = alike(0.015)
    total, expected, of_draft = speculative.Counts(), [0, 0, 0], draft.generation_config
    for seed in range(3):
        prompt = tokens(1, 7, seed=seed)
        text, proposed, forwards = by_hand(target, draft, prompt, 3, 17)
        got = speculative.add_to(total, config_of(temperature=0), target, draft, prompt)
        assert torch.equal(got[0], text)
        expected = [a + b for a, b in zip(expected, (proposed, forwards, 17), strict=True)]
    assert [total.proposed, total.forwards, total.added] == expected
    assert 0 < total.accepted < total.proposed
    assert draft.generation_config is of_draft, "other tasks ask the draft too"


def scores_of(monkeypatch, target, draft, **settings):
    monkeypatch.setattr(speculative, "_folder", lambda path: speculative.Path("nowhere"))
    opened = Opened(model=target, tokenizer=TOKENIZER)
    monkeypatch.setattr(speculative, "open_for_evaluation", lambda path, device: opened)
    monkeypatch.setattr(speculative, "_prompts", lambda *a: [tokens(1, 7, seed=seed) for seed in range(3)])
    offered = asked(draft)
    object.__setattr__(offered.opened, "tokenizer", TOKENIZER)
    return speculative.ask(config_of(**settings), DataConfig(), 0, offered)


def test_drawn_tokens_of_a_draft_that_is_the_target_are_all_accepted(monkeypatch):
    models, before = alike(0.0), torch.get_rng_state()
    share, tokens_a_pass = scores_of(monkeypatch, *models)
    assert torch.equal(torch.get_rng_state(), before)
    assert (share.metric, share.value) == ("accepted", 1)
    assert (tokens_a_pass.metric, tokens_a_pass.value) == ("tokens/pass", 17 / 5)
    worse, _ = scores_of(monkeypatch, tiny(seed=3).eval(), tiny(seed=4, initializer_range=1.0).eval())
    assert worse.value < 0.9
    again, _ = scores_of(monkeypatch, tiny(seed=3).eval(), tiny(seed=4, initializer_range=1.0).eval())
    assert again == worse


def test_other_vocabularies_and_long_texts_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match=rf"{VOCAB_SIZE + 3} rows of its embedding, and the draft {VOCAB_SIZE}"):
        scores_of(monkeypatch, tiny(vocab_size=VOCAB_SIZE + 3), tiny())
    with pytest.raises(ConfigError, match=r"7 \+ 90 tokens are more than a model's 64"):
        scores_of(monkeypatch, *alike(0.0), new_tokens=90)
