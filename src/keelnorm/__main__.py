"""`python -m keelnorm`: the command."""

import os
import sys

if sys.path[0] == os.getcwd() and not getattr(sys.flags, "safe_path", False):
    del sys.path[0]  # python -m puts it there; what lies in it is not to stand for installed packages

from keelnorm.cli import main

main()
