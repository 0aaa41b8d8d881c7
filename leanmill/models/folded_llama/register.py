"""Importing this makes `folded_llama` known to transformers' AutoConfig, AutoModel and AutoModelForCausalLM."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from leanmill.models.folded_llama.configuration_folded_llama import FoldedLlamaConfig
from leanmill.models.folded_llama.modeling_folded_llama import FoldedLlamaForCausalLM, FoldedLlamaModel


AutoConfig.register("folded_llama", FoldedLlamaConfig)
AutoModel.register(FoldedLlamaConfig, FoldedLlamaModel)
AutoModelForCausalLM.register(FoldedLlamaConfig, FoldedLlamaForCausalLM)
