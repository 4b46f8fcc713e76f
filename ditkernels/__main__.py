"""`python -m ditkernels`."""

import sys

from ditkernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
