"""`python -m svlm` is `svlm`."""

import sys

from .cli import main

sys.exit(main())
