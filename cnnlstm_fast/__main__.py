"""``python -m cnnlstm_fast``."""

import sys


def main() -> None:
    """Run the command line; exits with 1 and says what to install where its libraries are missing."""
    try:
        from cnnlstm_fast.cli import app
    except ModuleNotFoundError as error:
        if (missing := (error.name or "").partition(".")[0]) not in ("typer", "rich"):
            raise
        sys.exit(f"the command line needs {missing}, which is not installed: pip install typer rich")
    app(prog_name="python -m cnnlstm_fast")


if __name__ == "__main__":
    main()
