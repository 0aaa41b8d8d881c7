"""Importing this makes `side_network` known to transformers' AutoConfig and AutoModelForCausalLM."""

from transformers import AutoConfig, AutoModelForCausalLM

from leanmill.peft_ext.side_network.configuration_side_network import SideNetworkConfig
from leanmill.peft_ext.side_network.modeling_side_network import SideNetworkForCausalLM


AutoConfig.register("side_network", SideNetworkConfig)
AutoModelForCausalLM.register(SideNetworkConfig, SideNetworkForCausalLM)
