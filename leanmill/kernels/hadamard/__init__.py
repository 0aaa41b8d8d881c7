"""Walsh-Hadamard transforms of the last dim, and QuEST's quantiser on top of them."""
