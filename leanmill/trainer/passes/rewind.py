"""Pruned models with the weights of an earlier moment: lottery tickets.

Frankle and Carbin 2019, arXiv:1803.03635; to a step of training rather than to initialisation: Frankle et al. 2020,
arXiv:1912.05671.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from leanmill.core.errors import RunError
from leanmill.core.folders import new_folder
from leanmill.models.pretrained import quiet_transformers
from leanmill.trainer.passes.folder import SourceFolder, TargetFolder


def draw(model: Path, out: Path, *, seed: int, trust_remote_code: bool = False) -> None:
    """Write a model of the same configuration with weights that transformers draws, fp32.

    Args:
        model: A folder; its configuration is taken.
        out: Folder to create.
        seed: Of the weights.
        trust_remote_code: As of the recipe's model.

    Raises:
        RunError: The disk refuses.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    import leanmill.models.own_families  # noqa: F401

    with new_folder(out) as folder, quiet_transformers(), torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        drawn = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
        drawn.save_pretrained(folder)


def rewind(pruned: Path, earlier: Path, out: Path) -> None:
    """Write the model `earlier` with zeros where the layers that passes pruned have them.

    Args:
        pruned: What `compress` wrote.
        earlier: A folder of the same model at another moment; its values and dtypes are taken.
        out: Folder to create.

    Raises:
        RunError: The two hold other tensors, or the disk refuses.
    """
    zeros, values = SourceFolder(pruned), SourceFolder(earlier)
    if zeros.keys != values.keys:
        differing = sorted(zeros.keys ^ values.keys)
        raise RunError(
            f"{pruned} and {earlier} hold different tensors ({differing[0]}), so one cannot be rewound to the other"
        )
    layers = set(json.loads((pruned / "leanmill.json").read_text(encoding="utf-8"))["layers"])
    with new_folder(out) as folder:
        target = TargetFolder(folder)
        for name in sorted(values.keys):
            value = values.read([name])[name]
            if name.removesuffix(".weight") in layers:
                value = torch.where(zeros.read([name])[name] != 0, value, torch.zeros_like(value))
            target.write({name: value})
        target.close(values)
        shutil.copyfile(pruned / "leanmill.json", folder / "leanmill.json")
