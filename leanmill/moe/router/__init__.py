"""Options of routers' decisions."""
