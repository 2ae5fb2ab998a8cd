"""Run `python -m tokenizer.reconstruct` as a child process and return the folder it wrote.

The packages meet only on disk: eval knows the command line and the pair media shards, nothing else.
Under a distributed launcher every process starts its own child; the children find each other with
the same RANK and WORLD_SIZE at another port, and share the work.
"""

import contextlib
import ctypes
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from eval.config import RfidConfig
from eval.measure import check_launcher

MODULE = "tokenizer.reconstruct"
POLL_S = 0.2
TAIL_LINES = 20  # shown of a child that fails without a line "error: ..."
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Outcome:
    """How a child ended."""

    code: int  # exit code, negative for the signal that ended it
    errors: list[str]  # its lines "error: ..."
    tail: list[str]  # the last lines of its stderr, where it failed by itself


def reconstruct(config: RfidConfig, accelerator: Accelerator) -> Path:
    """Reconstruct `config.data` with `config.ckpt` into a folder under `config.out`.

    An interrupted reconstruction goes on where it was; a finished one is not repeated. If a child
    fails, all processes end with its exit code, and its message is shown once.
    """
    folder = pairs_folder(config)
    flag = folder.with_name(folder.name + ".failed")
    if accelerator.is_main_process:
        folder.parent.mkdir(parents=True, exist_ok=True)
        flag.unlink(missing_ok=True)
    port = [_free_port() if accelerator.is_main_process else 0]
    broadcast_object_list(port)  # also keeps the others from looking for the flag too early
    command = [sys.executable, "-m", MODULE, *overrides(config, folder)]
    environment = child_environment(port[0])
    outcomes = gather_object([_run(command, environment, flag, accelerator.is_main_process)])
    if not any(outcome.code for outcome in outcomes):
        return folder
    if accelerator.is_main_process:
        flag.unlink(missing_ok=True)
        for line in _unseen(outcomes):
            print(line, file=sys.stderr)
    # A negative code is a child that a signal ended.
    raise SystemExit(next((outcome.code for outcome in outcomes if outcome.code > 0), 1))


def discard(folder: Path) -> None:
    """Delete reconstructions that this module made; the manifest goes first.

    A folder without its manifest counts as unfinished, so a deletion that is interrupted never
    leaves something that looks complete.
    """
    (folder / "manifest.json").unlink()
    shutil.rmtree(folder)


def pairs_folder(config: RfidConfig) -> Path:
    """Return the folder for these reconstructions: the same for the same checkpoint and data."""
    request = [str(value) for value in (config.ckpt, *vars(config.data).values())]
    weights = Path(config.ckpt or "").expanduser() / "model.safetensors"
    if weights.is_file():  # a checkpoint that was trained further is another one
        status = weights.stat()
        request += [str(status.st_size), str(status.st_mtime_ns)]
    digest = hashlib.sha256("\n".join(request).encode()).hexdigest()[:12]
    return Path(config.out) / f"pairs-{digest}"


def overrides(config: RfidConfig, folder: Path) -> list[str]:
    """Return the options of `tokenizer.reconstruct` in Hydra's grammar."""
    options = {
        "ckpt": config.ckpt,
        "data.root": config.data.root,
        "data.split": config.data.split,
        "data.resolution": config.data.resolution,
        "out": str(folder),
        "batch_size": config.reconstruct_batch_size,
    }
    quoted = [
        f"{name}={value}" if isinstance(value, int) else f"{name}={_quoted(value)}"
        for name, value in options.items()
        if value is not None
    ]
    return [f"data={config.data.name}", "encoding=npy", *quoted]


def child_environment(port: int) -> dict[str, str]:
    """Return the environment of a child: this one, with another rendezvous."""
    environment = dict(os.environ)
    if "MASTER_PORT" in environment:
        environment["MASTER_PORT"] = str(port)
        # torchrun's children otherwise expect the agent of the launcher to serve the rendezvous.
        environment["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    return environment


def _run(command: list[str], environment: dict[str, str], flag: Path, echo: bool) -> Outcome:
    """Run a child to its end, or stop it when the child of another process has failed.

    echo: whether its progress and errors go to the terminal.
    """
    received: list[str] = []
    stopped = False
    child = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, preexec_fn=_end_with_parent()
    )
    assert child.stderr is not None
    reader = threading.Thread(target=_follow, args=(child.stderr, echo, received), daemon=True)
    reader.start()
    try:
        while child.poll() is None:
            check_launcher()
            if flag.exists():
                stopped = True
                child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=POLL_S)
    finally:
        child.kill()  # does nothing to a child that has ended
    reader.join()
    errors = [line for line in received if line.startswith("error:")]
    if child.returncode == 0 or stopped:
        return Outcome(child.returncode, errors, [])
    flag.touch()
    if child.returncode < 0:
        errors.append(_ended_by(-child.returncode))
        if echo:
            print(errors[-1], file=sys.stderr)
    return Outcome(child.returncode, errors, received[-TAIL_LINES:])


def _unseen(outcomes: list[Outcome]) -> list[str]:
    """Return what the main process, whose child's stderr was shown, has to add to explain."""
    first, *others = outcomes
    errors = dict.fromkeys(line for outcome in others for line in outcome.errors)
    if errors or first.errors:
        return [line for line in errors if line not in first.errors]
    # Without such a line it is a traceback; where several failed one explains the others.
    return [] if first.tail else next((outcome.tail for outcome in others if outcome.tail), [])


def _ended_by(number: int) -> str:
    name = signal.Signals(number).name
    hint = "; perhaps the machine ran out of memory" if number == signal.SIGKILL else ""
    return f"error: {MODULE} was ended by {name}{hint}; the same command goes on where it was"


def _follow(stream: IO[bytes], echo: bool, received: list[str]) -> None:
    """Read a child's stderr to its end, as it comes, and collect its last lines."""
    text = b""
    while chunk := os.read(stream.fileno(), 4096):
        if echo:
            sys.stderr.write(chunk.decode(errors="replace"))
            sys.stderr.flush()
        text = (text + chunk)[-65536:]
    received += text.decode(errors="replace").splitlines()


def _end_with_parent() -> Callable[[], None] | None:
    """On Linux, ask the kernel to end the child when this process dies, be it by SIGKILL.

    Otherwise the same command, run again, would meet the old child writing to the same folder.
    """
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "\\'") + "'"
