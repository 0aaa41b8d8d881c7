"""ZipLM: heads and neurons removed by second-order error and measured latency."""
