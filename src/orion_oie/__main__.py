"""`python -m orion_oie`."""

import sys

from orion_oie.cli.main import main

sys.exit(main())
