"""Importing this makes `linear_llama` known to transformers' AutoConfig, AutoModel and AutoModelForCausalLM."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from leanmill.models.linear_llama.configuration_linear_llama import LinearLlamaConfig
from leanmill.models.linear_llama.modeling_linear_llama import LinearLlamaForCausalLM, LinearLlamaModel


AutoConfig.register("linear_llama", LinearLlamaConfig)
AutoModel.register(LinearLlamaConfig, LinearLlamaModel)
AutoModelForCausalLM.register(LinearLlamaConfig, LinearLlamaForCausalLM)
