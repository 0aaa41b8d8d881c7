"""Importing this makes `pruned_llama` known to transformers' AutoConfig, AutoModel and AutoModelForCausalLM."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from leanmill.models.pruned_llama.configuration_pruned_llama import PrunedLlamaConfig
from leanmill.models.pruned_llama.modeling_pruned_llama import PrunedLlamaForCausalLM, PrunedLlamaModel


AutoConfig.register("pruned_llama", PrunedLlamaConfig)
AutoModel.register(PrunedLlamaConfig, PrunedLlamaModel)
AutoModelForCausalLM.register(PrunedLlamaConfig, PrunedLlamaForCausalLM)
