"""`python -m tinylm <command>`: the same as `tinylm <command>`."""

from tinylm.cli import main

raise SystemExit(main())
