"""`python -m experiments.published`: the same as `diptych published`."""

import sys

from experiments.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["published"]
    main()
