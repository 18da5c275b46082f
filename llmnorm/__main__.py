"""`python -m llmnorm`."""

import sys

from llmnorm.cli import main

if __name__ == "__main__":
    sys.exit(main())
