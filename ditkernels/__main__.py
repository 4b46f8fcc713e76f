"""`python -m ditkernels`."""

import sys

if not __package__:  # run as a file, or as a folder
    print("ditkernels: error: run `python -m ditkernels COMMAND ...`", file=sys.stderr)
    sys.exit(2)

from ditkernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
