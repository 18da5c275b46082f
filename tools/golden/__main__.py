"""The command `python -m tools.golden`."""

import sys

from tools.golden import main

sys.exit(main())
