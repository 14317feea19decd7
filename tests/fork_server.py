"""A ``python`` that starts at once: a fork of a process that has imported the libraries.

A process of the DAG imports PyTorch, diffusers and Snakemake for 3 to 10 s before it does anything, and most processes
of the tests do little else. So one server for each test process imports them once. `quick_bin` is a folder for PATH
whose ``python``, ``snakemake`` and ``dvc`` ask the server for a fork, which takes over their arguments, environment,
folder and streams, and imports this project's modules itself. It takes ``[-u] -m MODULE`` and ``-I -c CODE``; all else,
and a sitecustomize.py on PYTHONPATH, is for the ordinary Python. Tests of signals and of what is imported start
`sys.executable` instead.
"""

import atexit
import functools
import gc
import importlib
import os
import runpy
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

REPO = Path(__file__).parents[1]
LIBRARIES = [
    "boto3", "datasets", "diffusers.models.autoencoders.autoencoder_kl", "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.unets.unet_2d", "dvc.cli", "dvc.commands.repro", "dvc.repo", "dvc_s3", "jinja2",
    "matplotlib.pyplot", "open_clip", "pandas", "pyarrow.parquet", "scipy.linalg", "scipy.stats", "sklearn.datasets",
    "snakemake.cli", "snakemake.executors.local", "torch.distributed.run", "torchvision", "transformers", "typer",
]  # fmt: skip
CLIENT = """#!{python} -IS
import os, signal, socket, sys
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
served = name != "python" or words[:1] == ["-m"] or words[:2] in (["-u", "-m"], ["-I", "-c"])
folders = os.environ.get("PYTHONPATH", "").split(":")
if not served or any(os.path.exists(os.path.join(folder, "sitecustomize.py")) for folder in folders):
    os.execv("{python}", ["{python}", *(["-m", name] if name != "python" else []), *words])
connection = socket.socket(socket.AF_UNIX)
connection.connect("{address}")
socket.send_fds(connection, [b"."], [0, 1, 2])
pid = int(connection.recv(16))
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, _: os.kill(pid, number))
code = int(connection.recv(16) or 1)
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@functools.cache
def quick_bin() -> Path:
    """The folder for PATH; its server, started now, ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="dmd2-fork-"))  # the path of a socket has at most 107 bytes
    for name in ("python", "snakemake", "dvc"):
        (folder / name).write_text(CLIENT.format(python=sys.executable, address=folder / "socket"))
        (folder / name).chmod(0o755)
    server = subprocess.Popen([sys.executable, __file__, folder / "socket"], stdin=subprocess.DEVNULL)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.kill)
    while not (folder / "socket").exists():
        assert server.poll() is None, "the server of the tests' processes did not start"
        time.sleep(0.05)
    return folder


def torchrun(folder: Path, *words: str) -> tuple[int, str]:
    """Exit status and messages of two processes that run ``-m WORDS`` in a folder."""
    command = [str(quick_bin() / "python"), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    env = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*command, *words], cwd=folder, env=env, stderr=subprocess.PIPE, text=True) as process:
        try:
            messages = process.communicate(timeout=1800)[1]
        finally:
            process.terminate()  # if it hangs; torchrun then ends both processes
    return process.returncode, messages


def serve(address: str) -> list[str]:
    """Fork for every client; returns in the fork only, with its command line."""
    atexit.register(_leave)  # before those of the libraries, so it runs after theirs
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()  # a fork that collected or freed all these objects would copy their pages, for seconds
    parent, listening = os.getppid(), socket.socket(socket.AF_UNIX)
    listening.bind(address + ".tmp")
    listening.listen(64)
    listening.settimeout(5)
    os.rename(address + ".tmp", address)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    while os.getppid() == parent:
        try:
            connection, _ = listening.accept()
        except TimeoutError:
            continue
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listening.close()
            return _fork_for(connection, Path(address).parent)
        connection.close()
    shutil.rmtree(Path(address).parent, ignore_errors=True)  # its test process was killed
    sys.exit()


def _leave() -> None:
    """End without freeing what was inherited."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _fork_for(connection: socket.socket, folder: Path) -> list[str]:
    """In the fork, in the client's place; its parent tells the client when it ends, and kills it if the client is gone."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    client = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    place = Path("/proc", str(client))
    words, environment = (
        [os.fsdecode(part) for part in (place / file).read_bytes().split(b"\0")[:-1]] for file in ("cmdline", "environ")
    )
    if pid := os.fork():
        with suppress(OSError):  # the child does it, too: whoever comes first
            os.setpgid(pid, pid)
        connection.sendall(f"{pid:16}".encode())
        ended = os.pidfd_open(pid)
        if ended not in select.select([connection, ended], [], [])[0]:
            os.killpg(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with suppress(OSError):  # the client is gone
            connection.sendall(f"{code:16}".encode())
        os._exit(0)
    connection.close()
    os.setpgid(0, 0)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(place / "cwd")
    os.environ.clear()
    os.environ.update(entry.partition("=")[::2] for entry in environment)
    sys.executable = str(folder / "python")
    name, arguments = os.path.basename(words[2]), words[3:]
    return arguments if name == "python" else ["-m", name, *arguments]


if __name__ == "__main__":
    status = 1
    command = serve(sys.argv[1])
    option = command.pop(0) if command[0] in ("-u", "-I") else ""
    if option == "-u":
        sys.stdout.reconfigure(write_through=True)
    here = [] if os.environ.get("PYTHONSAFEPATH") else [os.getcwd()]
    folders = [*here, *filter(None, os.environ.get("PYTHONPATH", "").split(":"))]
    sys.path[:1] = folders if option != "-I" else []
    sys.argv = command[1:] if command[0] == "-m" else ["-c", *command[2:]]
    importlib.invalidate_caches()
    try:
        if command[0] == "-m":
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            exec(command[1], {"__name__": "__main__"})
        status = 0
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        raise
