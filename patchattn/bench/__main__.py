"""`python -m patchattn.bench`: the command `patchattn bench`."""

import sys

from ..cli.main import main

if __name__ == "__main__":
    main(["bench", *sys.argv[1:]])
