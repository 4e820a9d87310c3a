"""``python -m proxy`` is ``payload-logger``."""

import sys

from proxy.cli import main

sys.exit(main())
