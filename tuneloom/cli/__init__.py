"""The command line. Everything heavy is imported inside the commands: `tuneloom --help` answers at once."""

import sys

from tuneloom.cli.app import app
from tuneloom.errors import TuneloomError

__all__ = ["app", "main"]


def main() -> None:
    """Run a command; what people did wrong is one line on stderr and exit code 1."""
    try:
        app()
    except TuneloomError as error:
        print(f"error: {error.message}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
