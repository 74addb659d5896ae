"""`python -m starlayers.commands`, where the command `starlayers` is not on the path."""

import sys

from starlayers.commands import main

sys.exit(main())
