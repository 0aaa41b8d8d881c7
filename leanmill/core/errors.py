"""The two ways a run can be wrong, told apart because the exit code tells them apart."""

EXIT_RUN, EXIT_CONFIG, EXIT_INTERRUPTED = 1, 2, 130
"""Exit codes beside 0: a RunError or what nobody foresaw, a ConfigError, Ctrl-C."""


class ConfigError(ValueError):
    """What the user asked for cannot be done: a bad recipe, file, shape or combination.

    The message is one line that says what was given, what is allowed and what to type instead.
    The command line prints it without a traceback and exits with 2.
    """


class RunError(RuntimeError):
    """A valid request failed while it ran: a full disk, a dead hub, a non-finite loss.

    The command line prints the message without a traceback and exits with 1.
    """
