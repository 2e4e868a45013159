"""The entry point: it imports no library, so that a missing one can be named with its extra."""

from __future__ import annotations

import sys

from compose.extras import leave_out_torchao, missing_extra


def main() -> None:
    """Run the command line; 2, with the extra's name, where a library of an extra is missing."""
    leave_out_torchao()
    try:
        from compose.cli import main as run

        run()
    except ModuleNotFoundError as error:
        missing = missing_extra(error)
        if missing is None:
            raise
        print(f"error: {missing}", file=sys.stderr)
        sys.exit(missing.exit_code)
    except KeyboardInterrupt:  # before a command began, which would say how it goes on
        sys.exit(130)


if __name__ == "__main__":
    main()
