"""`python -m leanmill` is the `leanmill` command."""

import sys

from leanmill.cli.main import main


sys.exit(main())
