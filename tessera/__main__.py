"""`python -m tessera` is the command `tessera`."""

import sys
from importlib import import_module

sys.exit(import_module("pipelines.cli").main())
