"""MHA2MLA: keys that are rotary in part, and a latent that the rest of them and the values come from."""
