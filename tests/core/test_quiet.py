"""Only the lines of the table are kept back, and asking again shows nothing again."""

import logging
import warnings

from leanmill.core.quiet import ignore_warning, quiet_libraries


def test_only_the_named_lines_of_a_logger_are_kept_back(caplog):
    quiet_libraries()
    quiet_libraries()
    logger = logging.getLogger("torchao")
    with caplog.at_level(logging.WARNING):
        logger.warning("Failed to load /somewhere/_C_mxfp8.so: Could not load this library")
        logger.warning("Failed to load the weights")
    assert [record.getMessage() for record in caplog.records] == ["Failed to load the weights"]
    assert len(logger.filters) == 1


def test_ignoring_again_does_not_show_other_warnings_again():
    def warn():
        ignore_warning("expected here", UserWarning)
        warnings.warn("expected here, always", UserWarning, stacklevel=1)
        warnings.warn("worth reading once", UserWarning, stacklevel=1)

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for _ in range(3):
            warn()
    assert [str(warning.message) for warning in shown] == ["worth reading once"]
