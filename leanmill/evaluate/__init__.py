"""Models beside one another on tasks: what compression costs, domain by domain and group by group."""
