"""`python -m leanmill.cli` is the `leanmill` command."""

import sys

from leanmill.cli.main import main


sys.exit(main())
