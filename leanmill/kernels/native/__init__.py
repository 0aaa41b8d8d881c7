"""C for the CPU: compiled once with the machine's own compiler, called without torch's headers."""
