"""`python -m bench.audit`: the same as `python -m bench audit`."""

import sys

from bench.audit.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
