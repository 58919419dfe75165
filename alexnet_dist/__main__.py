"""`python -m alexnet_dist`: the command line."""

import sys

from alexnet_dist.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
