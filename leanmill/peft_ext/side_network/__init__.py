"""Networks beside a frozen model, which read what its blocks compute and send no gradient back through them."""
