"""peerify where Python has no POSIX: run as a program, in a folder with a dense model and text.txt.

The names that Windows lacks are taken away once the libraries are there, which have ways of their own. The modules are
refused to peerify, and to the code beside a converted model's weights, only.
"""

from __future__ import annotations

import builtins
import importlib
import os
import pkgutil
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

_MODULES = """
crypt curses fcntl grp nis ossaudiodev posix pty pwd readline resource spwd syslog termios tty
"""
_OF_OS = """
chown chroot confstr ctermid fchdir fchown fork forkpty fstatvfs getegid geteuid getgid getgroups getloadavg getpgid
getpgrp getpriority getsid getuid killpg lchown mkfifo mknod nice openpty posix_fadvise posix_fallocate posix_spawn
pread preadv pwrite pwritev register_at_fork sched_getaffinity sched_setaffinity sched_yield sendfile setegid seteuid
setgid setpgid setpriority setsid setuid statvfs sync sysconf tcgetpgrp ttyname uname wait wait3 wait4
O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_SYNC WNOHANG
"""
_OF_SIGNAL = """
SIGALRM SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP SIGUSR1 SIGUSR2 SIGWINCH
alarm pthread_kill pthread_sigmask setitimer siginterrupt sigpending sigtimedwait sigwait
"""
_LIBRARIES = """
torch torch.distributed.fsdp transformers transformers.models.llama.modeling_llama accelerate datasets peft numba click
rich.progress huggingface_hub safetensors.torch scipy.optimize pydantic yaml gguf psutil
"""
MODULES, OF_OS, OF_SIGNAL = (frozenset(names.split()) for names in (_MODULES, _OF_OS, _OF_SIGNAL))
KEPT = {"sendfile", "statvfs"}  # shutil and its like have seen that they are on POSIX, and go on using these
OURS = ("peerify", "transformers_modules")


def forget_posix() -> None:
    """Take away what is in the lists, from now on."""
    real = builtins.__import__

    def found(
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        importing = str((globals or {}).get("__name__", "")).split(".")[0]
        if level == 0 and importing in OURS and name.split(".")[0] in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, globals, locals, fromlist, level)

    builtins.__import__ = found
    for module, names in ((os, OF_OS), (signal, OF_SIGNAL)):
        for name in names & set(vars(module)) - KEPT:
            delattr(module, name)


def main() -> None:
    for library in _LIBRARIES.split():
        importlib.import_module(library)
    forget_posix()
    import peerify

    for module in pkgutil.walk_packages(peerify.__path__, "peerify."):
        if module.name != "peerify.__main__":  # which runs
            importlib.import_module(module.name)
    from click.testing import CliRunner

    from peerify.cli import cli
    from peerify.memory import peak_mb

    assert peak_mb() is None or sys.platform == "win32", "`resource` is refused, and psutil tells it on Windows only"

    def run(*argv: str) -> str:
        done = CliRunner().invoke(cli, list(argv))
        assert done.exit_code == 0, (argv, done.output)
        return done.output

    for command in cli.commands:
        assert "Examples:" in run(command, "--help")
    run("--help")
    run("env")
    run("convert", "dense", "peer", "--calibration", "text.txt", "--calibration-tokens", "512", "--context", "32")
    run("eval", "peer", "--against", "dense", "--data", "text.txt", "--context", "32", "--max-tokens", "64")

    import torch
    from transformers import AutoModelForCausalLM

    ids = torch.randint(3, 128, (1, 8))
    beside: Any = AutoModelForCausalLM.from_pretrained("peer", trust_remote_code=True)
    ours: Any = AutoModelForCausalLM.from_pretrained("peer")
    for model in (ours, beside):
        model.set_active(0.5)
    answers = [model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False) for model in (ours, beside)]
    assert answers[0].shape == (1, 12)
    assert torch.equal(*answers)
    sys.stdout.write("done\n")


if __name__ == "__main__":
    main()
