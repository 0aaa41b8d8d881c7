"""Where the time and memory of real steps go, by module."""
