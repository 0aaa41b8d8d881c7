"""What is seen of a run: observers, records, loggers, the HTML page."""
