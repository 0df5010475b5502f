"""`python -m mpvg` is the `mpvg` command."""

import sys

from mpvg.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
