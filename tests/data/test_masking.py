"""Hidden tokens: which they are depends on seed, row and place alone."""

import pytest
import torch

from leanmill.core.errors import ConfigError
from leanmill.data.build import build_eval_data, build_tokenizer, build_train_data
from leanmill.data.config import DataConfig, MaskingConfig
from leanmill.data.masking import Masking
from leanmill.data.tokenizer import load_tokenizer
from tests.data.samples import write_texts


SPECIAL = torch.tensor([0, 1, 2, 3])


def masking(share=0.3, as_mask=0.8, as_random=0.1, seed=5):
    return Masking(
        share=share, as_mask=as_mask, as_random=as_random, mask_id=3, vocab_size=500, special=SPECIAL, seed=seed
    )


def rows(num_rows=400, length=64):
    ids = torch.randint(500, (num_rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": torch.zeros_like(ids)}, torch.arange(num_rows)


def test_shares_are_those_asked_for():
    batch, numbers = rows()
    found = masking().hide(batch, numbers)
    hidden, ids = found["labels"] != -100, batch["input_ids"]
    assert torch.equal(found["labels"][hidden], ids[hidden])
    assert torch.equal(found["input_ids"][~hidden], ids[~hidden])
    assert not (hidden & torch.isin(ids, SPECIAL)).any()
    shown = found["input_ids"][hidden]
    candidates = (~torch.isin(ids, SPECIAL)).sum()
    assert hidden.sum() / candidates == pytest.approx(0.3, abs=0.01)
    assert (shown == 3).float().mean() == pytest.approx(0.8, abs=0.02)
    assert ((shown != 3) & (shown == ids[hidden])).float().mean() == pytest.approx(0.1, abs=0.02)
    others = shown[(shown != 3) & (shown != ids[hidden])]
    assert len(others.unique()) > 200  # of 500 tokens, about 760 draws


def test_a_row_is_hidden_alike_whatever_is_drawn_beside_it():
    batch, numbers = rows(8)
    whole = masking().hide(batch, numbers)
    part = masking().hide({name: value[5:7] for name, value in batch.items()}, numbers[5:7])
    assert torch.equal(whole["input_ids"][5:7], part["input_ids"])
    again = masking().hide(batch, numbers + 8)  # the same text in the next pass
    assert not torch.equal(again["labels"], whole["labels"])
    assert not torch.equal(masking(seed=6).hide(batch, numbers)["labels"], whole["labels"])


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masked")
    write_texts(folder / "a.jsonl", 40)
    return DataConfig(
        task="masked",
        source={"type": "hf", "path": str(folder / "a.jsonl"), "validation_fraction": 0.3},
        tokenizer={"vocab_size": 300},
        sequence_length=24,
        cache_dir=str(folder / "cache"),
    )


def test_rows_are_framed_texts_the_same_on_any_number_of_ranks(config):
    tokenizer = build_tokenizer(config)
    data = [build_train_data(config, tokenizer, seed=0) for _ in range(3)]
    one = data[0].next_rows(8)
    two = [source.next_rows(8, rank=rank, world_size=2) for rank, source in enumerate(data[1:])]
    for name in ("input_ids", "labels"):
        assert torch.equal(one[name], torch.cat([part[name] for part in two]))
    shown = torch.where(one["labels"] == -100, one["input_ids"], one["labels"])
    begins = (one["position_ids"] == 0) & (torch.arange(24) > 0)
    assert begins.any()
    assert (shown[begins] == tokenizer.cls_token_id).all()
    assert (shown.flatten().roll(1).view_as(shown)[begins] == tokenizer.sep_token_id).all()
    resumed = build_train_data(config, tokenizer, seed=0)
    resumed.load_state_dict(data[0].state_dict())
    assert torch.equal(resumed.next_rows(4)["input_ids"], data[0].next_rows(4)["input_ids"])


def test_held_out_rows_hide_the_same_tokens_every_time_and_count_their_bytes(config):
    tokenizer = build_tokenizer(config)
    (domain,) = build_eval_data(config, tokenizer, tokens_per_domain=240)
    hidden = domain.rows["labels"] != -100
    text = "".join(tokenizer.convert_ids_to_tokens(domain.rows["labels"][hidden].tolist()))
    assert domain.num_bytes == len(text)  # a byte-level token has a character a byte
    config = config.model_copy(update={"masking": MaskingConfig(share=0.5)})
    (more,) = build_eval_data(config, tokenizer, tokens_per_domain=240)
    assert (more.rows["labels"] != -100).sum() > 2 * hidden.sum()


def test_a_trained_tokenizer_frames_text_for_everybody(config):
    tokenizer = build_tokenizer(config)
    assert (tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id) == (
        0,
        1,
        2,
        3,
    )
    assert tokenizer("a")["input_ids"][0] == 1
    assert tokenizer("a")["input_ids"][-1] == 2


def test_a_tokenizer_without_a_mask_token_is_refused(config, tmp_path):
    causal = config.model_copy(update={"task": "pretrain"})
    build_tokenizer(causal).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has no cls_token, which encoders need"):
        load_tokenizer(str(tmp_path), for_encoder=True)


def test_shares_above_one_are_refused():
    with pytest.raises(ValueError, match="are more than 1 together"):
        MaskingConfig(as_mask=0.8, as_random=0.3)
