"""How evenly experts are loaded and how sure routers are, from the counts of a run; nothing of the maths changes."""
