"""
Run this project's scripts as processes of their own, without paying for `import torch` in each.

A helper process imports everything once and forks for every call, so each call is a real process: its own
exit code, streams, signals and limits; with world=2, two processes that find each other as under torchrun.

    run = forks.shared();  run("train.py --model cogact", cwd=folder)  ->  Done(rc, out, err, seconds, cpu)
"""
import atexit
import functools
import gc
import importlib
import json
import os
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
OPERATIONS = ((os, "replace"), (os, "fsync"), (shutil, "rmtree"), (Path, "symlink_to"), (Path, "mkdir"),
              (Path, "unlink"))


class Done(NamedTuple):
    rc: int                # exit code; -9: killed by signal 9. Of several processes: the first that is not 0
    out: str               # of rank 0
    err: str               # of all ranks
    seconds: float
    cpu: float             # seconds of computing, of all ranks


class Forks:
    def __init__(self):
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})
        atexit.register(self.server.stdin.close)

    def __call__(self, command, *more, cwd, **how):
        """command: "train.py --model ..." (split at spaces), then more arguments.

        how: kill_after=seconds; kill_at=k: kill -9 just before the k-th of OPERATIONS; term_at=text: SIGTERM
        to all when rank 0 has printed it; fsize=bytes: no larger file can be written; world=N processes;
        env={...}; alone=True: no file of this project can be imported but those in cwd.
        """
        job = {"argv": [*command.split(), *map(str, more)], "cwd": str(cwd), **how}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return Done(**json.loads(self.server.stdout.readline()))


@functools.cache
def shared():
    return Forks()


def training_state(folder):
    """{name: tensor} of a checkpoint's training state, whichever number of processes wrote it."""
    import torch
    from safetensors.torch import load_file
    parts, path = {}, Path(folder, "training_state")
    for file in json.loads((path / "run.json").read_text())["state"]:
        for name, t in load_file(path / file).items():
            parts.setdefault(name, []).append(t)
    return {name: torch.cat(ts) if len(ts) > 1 else ts[0] for name, ts in parts.items()}


def become(job, rank, world, port, folder):
    """The forked process: from here on it is `python SCRIPT ARGS` as far as anyone can tell."""
    for fd, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
    os.chdir(job["cwd"])
    os.environ.update(job.get("env", {}))
    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                          MASTER_ADDR="localhost", MASTER_PORT=str(port))
    if "fsize" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["fsize"], job["fsize"]))
    left = job.get("kill_at", 0)

    def counting(operation):
        def wrapper(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)
        return wrapper
    for place, name in OPERATIONS if left else ():
        setattr(place, name, counting(getattr(place, name)))
    sys.argv, code = job["argv"], 1
    try:
        if job.get("alone"):                                   # an environment inside ROOT stays in reach
            ours = {str(ROOT), *(str(ROOT / name) for name in ("tests", "benchmarks", "examples"))}
            for name, module in list(sys.modules.items()):
                if os.path.dirname(getattr(module, "__file__", None) or "") in ours:
                    del sys.modules[name]
            sys.path[:] = [job["cwd"], *(path for path in sys.path if path not in ours and path)]
        runpy.run_path(str(Path(job["cwd"] if job.get("alone") else ROOT, job["argv"][0])), run_name="__main__")
        code = 0
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def one(job):
    """Fork, wait, report."""
    world, begin = job.get("world", 1), time.time()
    folder = tempfile.mkdtemp()
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    pids = []
    for rank in range(world):
        pids.append(os.fork())
        if pids[-1] == 0:
            become(job, rank, world, port, folder)
    codes, out, cpu = {}, Path(folder, "out0"), 0.0
    while len(codes) < world:
        time.sleep(0.01)
        for pid in pids:
            done, status, used = os.wait4(pid, os.WNOHANG) if pid not in codes else (0, 0, None)
            if done:
                codes[pid], cpu = os.waitstatus_to_exitcode(status), cpu + used.ru_utime
        alive = [pid for pid in pids if pid not in codes]
        if any(codes.values()) or time.time() - begin > job.get("kill_after", 300):    # one failed: end all
            signals = signal.SIGKILL
        elif "term_at" in job and out.exists() and job["term_at"] in out.read_text():
            signals = signal.SIGTERM
            del job["term_at"]
        else:
            continue
        if alive and any(codes.values()):
            time.sleep(0.2)                                                 # the others may be leaving, too
        for pid in alive:
            os.kill(pid, signals)
    text = out.read_text() if out.exists() else ""
    err = "".join(path.read_text() for path in sorted(Path(folder).glob("err*")))
    shutil.rmtree(folder)
    rc = next((code for code in codes.values() if code), 0)
    return {"rc": rc, "out": text, "err": err, "seconds": time.time() - begin, "cpu": cpu}


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    for name in ("train", "cogact", "vla0"):
        importlib.import_module(name)
    gc.collect(), gc.freeze()                                  # a child's collection copies none of it
    for line in sys.stdin:
        print(json.dumps(one(json.loads(line))), flush=True)
