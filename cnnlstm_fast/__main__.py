"""``python -m cnnlstm_fast``."""

import sys

try:
    from cnnlstm_fast.cli import app
except ModuleNotFoundError as error:
    if error.name.partition(".")[0] not in ("rich", "typer"):
        raise
    sys.exit("the command line needs more packages: pip install typer rich")

app(prog_name="python -m cnnlstm_fast")
