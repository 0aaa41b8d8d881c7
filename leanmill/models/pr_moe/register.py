"""Importing this makes `pr_moe` known to transformers' AutoConfig, AutoModel and AutoModelForCausalLM."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from leanmill.models.pr_moe.configuration_pr_moe import PrMoeConfig
from leanmill.models.pr_moe.modeling_pr_moe import PrMoeForCausalLM, PrMoeModel


AutoConfig.register("pr_moe", PrMoeConfig)
AutoModel.register(PrMoeConfig, PrMoeModel)
AutoModelForCausalLM.register(PrMoeConfig, PrMoeForCausalLM)
