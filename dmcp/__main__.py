"""``python -m dmcp``, which ``torchrun -m dmcp`` starts in every process."""

import sys

from dmcp.cli import main

sys.exit(main())
