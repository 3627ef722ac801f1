"""`python -m zoo.cli` is the program `zoo`."""

import sys

from zoo.cli import main

sys.exit(main())
