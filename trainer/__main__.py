"""``python -m trainer``: train, check or convert a Kohya configuration without a page."""

import sys

from trainer import bootstrap

if __name__ == "__main__":
    bootstrap.ensure(None, "trainer", sys.argv[1:])
    from trainer.cli import main

    sys.exit(main(sys.argv[1:]))
