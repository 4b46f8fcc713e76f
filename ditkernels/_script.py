"""Ends a process whose script is a file of the package; ``import ditkernels`` begins with it.

Python looks for modules in the script's folder first, where random.py hides its own: imports then fail far from the cause. The
modules of the commands say so themselves, before they import anything, and name their command.
"""

import os
import sys


def _refuse() -> None:
    main = sys.modules.get("__main__")
    file = getattr(main, "__file__", None)
    if file is None or getattr(main, "__spec__", None) is not None:  # python -m has a spec
        return
    package = os.path.dirname(os.path.realpath(__file__))
    if os.path.realpath(file).startswith(os.path.join(package, "")):
        told = f"{os.path.basename(file)} is a part of a package; `python -m ditkernels --help` shows what can be run"
        print(f"ditkernels: error: {told}", file=sys.stderr)
        sys.exit(2)


_refuse()
