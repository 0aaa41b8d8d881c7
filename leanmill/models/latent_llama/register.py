"""Importing this makes `latent_llama` known to transformers' AutoConfig, AutoModel and AutoModelForCausalLM."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from leanmill.models.latent_llama.configuration_latent_llama import LatentLlamaConfig
from leanmill.models.latent_llama.modeling_latent_llama import LatentLlamaForCausalLM, LatentLlamaModel


AutoConfig.register("latent_llama", LatentLlamaConfig)
AutoModel.register(LatentLlamaConfig, LatentLlamaModel)
AutoModelForCausalLM.register(LatentLlamaConfig, LatentLlamaForCausalLM)
