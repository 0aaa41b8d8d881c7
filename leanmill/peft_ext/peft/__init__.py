"""Every adapter method of Hugging Face PEFT that fits beside a layer."""
