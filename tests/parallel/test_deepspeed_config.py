"""What a DeepSpeed configuration refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from leanmill.core.errors import ConfigError
from leanmill.parallel import config as configs
from leanmill.parallel.deepspeed_config import check_config, check_optimizer, derive_config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stage": 2, "offload_optimizer": {"device": "nvme", "path": "/"}}, "device: cpu"),
        ({"stage": 3, "offload_optimizer": {"device": "nvme", "path": "/no/such"}}, "create it first"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(configs.DeepSpeedEngine.model_validate(arguments))


def test_nvme_without_libaio_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: False)
    place = {"device": "nvme", "path": str(tmp_path)}
    with pytest.raises(ConfigError, match="apt-get install libaio-dev"):
        check_config(configs.DeepSpeedEngine.model_validate({"stage": 3, "offload_optimizer": place}))


def test_low_bit_optimizer_is_refused() -> None:
    optim = pytest.importorskip("torchao.optim")
    with pytest.raises(ConfigError, match="low-bit"):
        check_optimizer(optim.AdamW8bit([nn.Parameter(torch.zeros(4, 4))]))


def test_swapped_gradients_are_read_at_the_start_of_a_buffer(tmp_path: Path) -> None:
    """Two parameters in a sub-group would put the second at an offset that direct I/O may not read to."""

    config = configs.DeepSpeedEngine.model_validate(
        {"stage": 3, "offload_optimizer": {"device": "nvme", "path": str(tmp_path)}}
    )
    settings = derive_config(
        config, nn.Linear(3, 5), device=torch.device("cpu"), precision="fp32", num_micro_batches=1, max_grad_norm=None
    )
    assert settings["zero_optimization"]["sub_group_size"] == 1


def test_a_model_with_an_odd_number_of_elements_gets_an_even_bucket() -> None:
    settings = derive_config(
        configs.DeepSpeedEngine.model_validate({"stage": 1}),
        nn.Linear(3, 1, bias=False),
        device=torch.device("cpu"),
        precision="fp32",
        num_micro_batches=1,
        max_grad_norm=None,
    )
    assert settings["zero_optimization"]["allgather_bucket_size"] == 4
