"""`python -m doorstep` is `doorstep`."""

import sys

from doorstep.cli import main

sys.exit(main())
