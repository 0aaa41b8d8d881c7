"""How routers decide, read from what they compute; and that decision made by our own router, for all who read it."""
