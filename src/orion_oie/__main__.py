"""`python -m orion_oie`."""

import sys

from orion_oie.cli import main

sys.exit(main())
