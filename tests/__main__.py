"""``python -m tests``: sets up what the tests need, then runs ruff, mypy and pytest.

With arguments it runs pytest alone, with those arguments (``python -m tests -k buckets``).
"""

import sys

from trainer import bootstrap  # first of all: it ends here on a Python that is too old


def main() -> None:
    """Set up, check, and end with 0 only if every check went well."""
    bootstrap.ensure("test", "tests", sys.argv[1:])

    from tests import checks

    sys.exit(checks.run(sys.argv[1:]))


if __name__ == "__main__":
    main()
