"""`python -m inlay` is the command `inlay`."""

from inlay.cli import main

raise SystemExit(main())
