"""``python -m app``: sets the program up where that is due, and serves the page."""

import sys

from trainer import bootstrap  # first of all: it ends here on a Python that is too old


def main() -> None:
    """Read the flags, make sure that everything is installed, serve."""
    from app import options

    complete = options.read(sys.argv[1:])
    bootstrap.ensure(None, "app", sys.argv[1:])

    import platformdirs

    from app import server

    server.serve(complete(lambda: platformdirs.user_state_path("lora-kiln", appauthor=False)))


if __name__ == "__main__":
    main()
