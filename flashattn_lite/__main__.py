"""``python -m flashattn_lite``: the same as the command ``flashattn-lite``."""

import sys

from flashattn_lite.cli import main

sys.exit(main())
