"""The child process: its options, its environment, its failures."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate import Accelerator
from hydra.core.override_parser.overrides_parser import OverridesParser

import eval.reconstruct
from eval.config import DataConfig, RfidConfig
from eval.reconstruct import (
    Outcome,
    _unseen,
    child_environment,
    discard,
    overrides,
    pairs_folder,
    reconstruct,
)


def config(tmp_path, **fields):
    fields = {"ckpt": "outputs/tok", "out": str(tmp_path / "out")} | fields
    return RfidConfig(**fields)


@pytest.fixture
def child(tmp_path, monkeypatch):
    """Return a function that installs a fake `tokenizer.reconstruct` with this code."""

    def install(code):
        (tmp_path / "fake_reconstruct.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(eval.reconstruct, "MODULE", "fake_reconstruct")

    return install


def test_options_survive_hydras_grammar(tmp_path):
    odd = "a b=c,{d}'e"
    options = overrides(
        config(tmp_path, ckpt=odd, data=DataConfig("folder", odd, "val", 64)), Path("out dir")
    )
    parsed = OverridesParser.create().parse_overrides(options)
    values = {item.key_or_group: item.value() for item in parsed}
    values = {key: str(value).strip("'") for key, value in values.items()}
    assert values["ckpt"].replace("\\'", "'") == odd
    assert values["data"] == "folder" and values["data.root"].replace("\\'", "'") == odd
    assert values["data.resolution"] == "64" and values["out"] == "out dir"
    assert values["encoding"] == "npy" and "batch_size" not in values


def test_the_child_writes_the_folder_and_its_progress_is_shown(tmp_path, child, capfd):
    child(
        "import sys, pathlib\n"
        "out = next(a for a in sys.argv if a.startswith('out='))[5:-1]\n"
        "pathlib.Path(out).mkdir(parents=True)\n"
        "pathlib.Path(out, 'manifest.json').write_text('{}')\n"
        "print('written'); print('50% done', file=sys.stderr)\n"
    )
    folder = reconstruct(config(tmp_path), Accelerator(cpu=True))
    assert (folder / "manifest.json").exists() and folder.parent == tmp_path / "out"
    out, err = capfd.readouterr()
    assert "written" in out and "50% done" in err
    discard(folder)
    assert list(folder.parent.iterdir()) == []


def test_the_childs_error_is_shown_once_and_its_exit_code_kept(tmp_path, child, capfd):
    child("import sys\nprint('error: no such checkpoint', file=sys.stderr)\nsys.exit(3)\n")
    with pytest.raises(SystemExit) as stop:
        reconstruct(config(tmp_path), Accelerator(cpu=True))
    assert stop.value.code == 3
    assert capfd.readouterr().err.count("error: no such checkpoint") == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_a_child_is_stopped_when_that_of_another_process_has_failed(tmp_path, child):
    flag = tmp_path / "x.failed"
    flag.touch()
    child("import time\ntime.sleep(60)\n")
    start = time.monotonic()
    command = [sys.executable, "-m", "fake_reconstruct"]
    outcome = eval.reconstruct._run(command, dict(os.environ), flag, echo=False)
    assert outcome.code == -signal.SIGTERM and time.monotonic() - start < 30
    assert outcome.errors == outcome.tail == []  # the other one explains


def test_a_child_that_is_killed_is_said_and_stops_the_others(tmp_path, child, capfd):
    child("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    with pytest.raises(SystemExit) as stop:
        reconstruct(config(tmp_path), Accelerator(cpu=True))
    assert stop.value.code == 1
    assert capfd.readouterr().err.count("error: fake_reconstruct was ended by SIGKILL") == 1
    command = [sys.executable, "-m", "fake_reconstruct"]
    flag = tmp_path / "x.failed"
    outcome = eval.reconstruct._run(command, dict(os.environ), flag, echo=False)
    assert flag.exists() and outcome.code == -signal.SIGKILL


def test_a_traceback_of_another_process_is_shown_where_nothing_else_explains(tmp_path, child):
    child("raise RuntimeError('broken')\n")
    command = [sys.executable, "-m", "fake_reconstruct"]
    other = eval.reconstruct._run(command, dict(os.environ), tmp_path / "x.failed", echo=False)
    stopped = Outcome(-signal.SIGTERM, [], [])
    assert _unseen([stopped, other])[-1] == "RuntimeError: broken"
    assert _unseen([other, other]) == []  # that of the main process was shown as it came
    named = Outcome(1, ["error: no data"], ["Traceback", "error: no data"])
    assert _unseen([stopped, other, named]) == ["error: no data"]
    assert _unseen([named, named]) == []


def test_an_orphan_of_a_killed_launcher_stops(tmp_path, child, monkeypatch):
    child("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr("eval.measure._PARENT", -1)
    command = [sys.executable, "-m", "fake_reconstruct"]
    with pytest.raises(SystemExit, match="the launcher of this process was killed"):
        eval.reconstruct._run(command, dict(os.environ), tmp_path / "x.failed", echo=False)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs prctl")
def test_a_killed_parent_takes_the_child_with_it(tmp_path, child):
    child(
        "import os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path)!r}, 'pid').write_text(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import eval.reconstruct as r, pathlib, os, sys\n"
            "command = [sys.executable, '-m', 'fake_reconstruct']\n"
            "r._run(command, dict(os.environ), pathlib.Path('none'), True)",
        ]
    )
    pid_file = tmp_path / "pid"
    wait_for(lambda: pid_file.exists() and pid_file.read_text())
    parent.kill()
    parent.wait()
    wait_for(lambda: not running(int(pid_file.read_text())))


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_children_of_a_launcher_meet_at_another_port(monkeypatch):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert child_environment(1234) == dict(os.environ)
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("RANK", "1")
    environment = child_environment(1234)
    assert environment["MASTER_PORT"] == "1234" and environment["RANK"] == "1"
    assert environment["TORCHELASTIC_USE_AGENT_STORE"] == "False"


def test_another_request_or_checkpoint_has_another_folder(tmp_path):
    ckpt = tmp_path / "ckpt"
    ckpt.mkdir()
    (ckpt / "model.safetensors").write_bytes(b"1")
    one = config(tmp_path, ckpt=str(ckpt))
    before = pairs_folder(one)
    assert pairs_folder(one) == before
    other = config(tmp_path, ckpt=str(ckpt), data=DataConfig(resolution=128))
    assert pairs_folder(other) != before
    (ckpt / "model.safetensors").write_bytes(b"22")
    assert pairs_folder(one) != before
