"""`python -m pipelines` is the command `tessera`."""

import sys

from pipelines.cli import main

sys.exit(main())
