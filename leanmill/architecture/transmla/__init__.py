"""TransMLA: grouped-query attention becomes multi-head latent attention."""
