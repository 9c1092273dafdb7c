"""Programs in processes of their own that are forked from one that has imported torch: each saves 2 seconds.

What malloc returns is poisoned there. For settings that are read when torch is loaded (OpenMP's, malloc's)
there is :func:`helpers.run_python`; what is read later (oneDNN's), ``code`` itself may set.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import types
from pathlib import Path


@functools.cache
def _server() -> subprocess.Popen:
    """The process that forks; one for each process of the test run."""
    import cnnlstm_fast

    root = Path(cnnlstm_fast.__file__).parents[1]
    env = os.environ | {"PYTHONPATH": str(root), "MALLOC_PERTURB_": "128"}
    server = subprocess.Popen(
        [sys.executable, __file__], env=env, cwd=root,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1,
    )  # fmt: skip
    atexit.register(server.communicate)
    return server


def run_forked(code: str, timeout: float = 120, **env: str) -> subprocess.CompletedProcess:
    """Run ``code`` in a process of its own, where a crash is a result like any other."""
    assert all(name.startswith("CNNLSTM_FAST_") for name in env), "others are read when torch is loaded"
    server = _server()
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        request = {"code": code, "env": os.environ | env, "paths": [out.name, err.name]}
        server.stdin.write(json.dumps(request) + "\n")
        child = int(server.stdout.readline())
        late = not select.select([server.stdout], [], [], timeout)[0]
        if late:
            os.kill(child, signal.SIGKILL)
        status = int(server.stdout.readline())
        done = subprocess.CompletedProcess([sys.executable, "-c", code], status, out.read(), err.read())
    if late:
        raise subprocess.TimeoutExpired(done.args, timeout, done.stdout, done.stderr)
    return done


def _serve() -> dict:
    """Answer each request with the number and the exit status of a child; returns in the child."""
    import torch  # noqa: F401

    for line in iter(sys.stdin.readline, ""):
        child = os.fork()
        if not child:
            return json.loads(line)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


def _become(request: dict) -> None:
    """Take the environment of a request; what is printed goes to its files."""
    nowhere = os.open(os.devnull, os.O_RDONLY)
    for to, source in enumerate([nowhere, *(os.open(path, os.O_WRONLY) for path in request["paths"])]):
        os.dup2(source, to)
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv, sys.path[0] = ["-c"], ""


if __name__ == "__main__":
    asked = _serve()
    _become(asked)
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    exec(compile(asked["code"], "<string>", "exec"), vars(main))
