"""QuEST: Hadamard rotation, the Gaussian's best clip, trust gradient."""
