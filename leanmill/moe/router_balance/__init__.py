"""Load balance of routers."""
