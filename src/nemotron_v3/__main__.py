"""`python -m nemotron_v3`: the command `nemotron-v3`."""

import sys

from nemotron_v3.cli.main import main

sys.exit(main())
