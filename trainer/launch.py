"""A run over several devices or machines: child processes under ``accelerate launch``.

The parent writes the configuration beside the journal, starts the children without a shell, and reads
their journal as it grows, so that whoever follows the parent sees what they would see of a run in
this process. What a person asks of the run goes into a file that the children look at. On a CPU
``accelerate launch`` starts one process whatever it is told, so torch's own launcher does it there.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from trainer import config as configuration
from trainer.controls import Controls
from trainer.errors import ConfigError, TrainerError
from trainer.events import (
    Event,
    EventLog,
    JobFailed,
    JobFinished,
    JobStopped,
    PhaseStarted,
    read_journal,
    read_line,
)
from trainer.files import REPOSITORY, atomic_write
from trainer.job import Job, Note
from trainer.loop import Outcome

__all__ = [
    "LAUNCHED",
    "check",
    "command",
    "is_child",
    "is_told",
    "notes",
    "obey",
    "processes",
    "run",
    "wants_children",
]

LAUNCHED = "LORA_KILN_LAUNCHED"
"""Set for children of `run`, whose parent says why they failed."""

LAUNCHERS = (LAUNCHED, "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")
"""Variables of a process that was started by a launcher, this one or another."""

LOOK_EVERY_S = 0.2
KILL_AFTER_S = 20.0

TAKEN: Mapping[str, bool] = {
    "debug": False,
    "enable_cpu_affinity": False,
    "machine_rank": True,
    "main_process_ip": True,
    "main_process_port": True,
    "monitor_interval": True,
    "num_cpu_threads_per_process": True,
    "quiet": False,
    "rdzv_backend": True,
    "rdzv_conf": True,
    "same_network": False,
}
"""Options of accelerate launch that extra_accelerate_launch_args may hold, and whether they have a value."""


def is_child() -> bool:
    """Whether a launcher started this process: it trains, and starts no others."""
    return any(name in os.environ for name in LAUNCHERS) or int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_told() -> bool:
    """Whether `run` started this process, so that a parent says why the run failed."""
    return LAUNCHED in os.environ


def processes(job: Job) -> int:
    """Processes that train, over all machines."""
    return max(job.config.num_processes, 1) if _machines(job) == 1 else max(job.config.num_processes, 2)


def wants_children(job: Job) -> bool:
    """Whether ``job`` is trained by child processes and not in this one."""
    config = job.config
    other_card = config.gpu_ids.strip() not in ("", "0", "all") and torch.cuda.is_available()
    return processes(job) > 1 or other_card


def notes(job: Job) -> list[Note]:
    """What is done otherwise than written."""
    config = job.config
    if config.multi_gpu and processes(job) == 1:
        return [
            Note(
                "multi_gpu",
                True,
                False,
                "num_processes is 1, so one card trains: set it to the number of cards",
            )
        ]
    return []


def check(job: Job) -> None:
    """Refuse what cannot be launched.

    Raises:
        ConfigError: With what to change.
    """
    if not wants_children(job):
        return
    extra(job)
    config, machines = job.config, _machines(job)
    ids = config.gpu_ids.strip()
    if ids not in ("", "all") and not re.fullmatch(r"\d+(\s*,\s*\d+)*", ids):
        raise ConfigError(f"gpu_ids is {ids!r}: write the numbers of the cards with commas, e.g. 0,1")
    if processes(job) % machines:
        raise ConfigError(
            f"num_processes is {processes(job)} over num_machines {machines}: it counts the processes of all "
            "machines together, so it must be a multiple of them"
        )
    here = processes(job) // machines
    if torch.cuda.is_available():
        cards = torch.cuda.device_count()
        if here > cards:
            raise ConfigError(
                f"num_processes asks for {here} processes on this machine, which has {cards} graphics cards: "
                "one card each is needed"
            )
        missing = [one for one in _ids(job) if one >= cards]
        if missing:
            raise ConfigError(f"gpu_ids names card {missing[0]}, but this machine has cards 0 to {cards - 1}")
        if _ids(job) and len(_ids(job)) < here:
            raise ConfigError(f"gpu_ids names {len(_ids(job))} cards for {here} processes: name {here}")
    elif machines > 1:
        raise ConfigError(
            f"num_machines is {machines}, but this machine has no graphics card: set num_machines to 1"
        )
    if machines > 1 and not {"machine_rank", "main_process_ip"} <= set(extra(job)):
        raise ConfigError(
            f"num_machines is {machines}: extra_accelerate_launch_args must hold --machine_rank and "
            "--main_process_ip, each machine its own rank"
        )
    if machines > 1 and not (config.main_process_port or "main_process_port" in extra(job)):
        raise ConfigError(f"num_machines is {machines}: set main_process_port, the same on all machines")


def extra(job: Job) -> dict[str, str]:
    """The options in extra_accelerate_launch_args.

    Raises:
        ConfigError: One that is not taken.
    """
    text = job.config.extra_accelerate_launch_args
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(
            f"extra_accelerate_launch_args {text!r} cannot be split into options ({error})"
        ) from error
    found: dict[str, str] = {}
    while words:
        word, equals, value = words.pop(0).partition("=")
        name = word.removeprefix("--").replace("-", "_")
        if not word.startswith("--") or name not in TAKEN:
            raise ConfigError(
                f"extra_accelerate_launch_args holds {word!r}, which is not taken here; what is: "
                + ", ".join(f"--{known}" for known in TAKEN)
            )
        if TAKEN[name] and not equals:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"extra_accelerate_launch_args: {word} needs a value")
            value = words.pop(0)
        found[name] = value if TAKEN[name] else ""
    return found


def command(job: Job, arguments: Sequence[str]) -> list[str]:
    """What starts the children.

    Args:
        job: Says how many, and where.
        arguments: What each child gets behind ``python -m trainer``.
    """
    config, more = job.config, extra(job)
    port = more.pop("main_process_port", str(config.main_process_port or ""))
    if not torch.cuda.is_available():
        where = ["--master_port", port] if port else ["--standalone"]
        count = ["--nproc_per_node", str(processes(job)), "--nnodes", "1"]
        return [sys.executable, "-m", "torch.distributed.run", *where, *count, "-m", "trainer", *arguments]
    words = [sys.executable, "-m", "accelerate.commands.launch"]
    words += ["--num_processes", str(processes(job)), "--num_machines", str(_machines(job))]
    words += ["--mixed_precision", config.mixed_precision, "--dynamo_backend", "no"]
    threads = more.pop("num_cpu_threads_per_process", str(max(config.num_cpu_threads_per_process, 1)))
    words += ["--num_cpu_threads_per_process", threads]
    if processes(job) > 1:  # accelerate refuses multi_gpu for one
        words += ["--multi_gpu"]
    if _ids(job):
        words += ["--gpu_ids", ",".join(map(str, _ids(job)))]
    if port:
        words += ["--main_process_port", port]
    for name, value in more.items():
        words += [f"--{name}", value] if value else [f"--{name}"]
    return [*words, "--module", "trainer", *arguments]


def _machines(job: Job) -> int:
    return max(job.config.num_machines, 1)


def _ids(job: Job) -> list[int]:
    text = job.config.gpu_ids.strip()
    return [] if text in ("", "all") else [int(part) for part in text.split(",")]


# ---- the parent --------------------------------------------------------------------------------


@dataclass
class _Reader:
    """Events of a journal that another process writes, as they come."""

    path: Path
    end: JobFinished | JobStopped | JobFailed | None = None
    step: int = 0
    _at: int = 0
    _rest: bytes = field(default=b"")

    def pass_on(self, events: EventLog) -> None:
        try:
            with self.path.open("rb") as file:
                file.seek(self._at)
                data = file.read()
        except FileNotFoundError:
            return
        self._at += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            event = read_line(line.decode("utf-8", errors="replace"))
            if event is not None:
                self._note(event)
                events.relay(event)

    def _note(self, event: Event) -> None:
        self.step = int(getattr(event, "step", self.step))
        if isinstance(event, JobFinished | JobStopped | JobFailed):
            self.end = event


def run(job: Job, events: EventLog, controls: Controls) -> Outcome:
    """Train ``job`` in child processes, to its end.

    Args:
        job: What to train.
        events: Gets what the children say; they write the journal.
        controls: Stop, save and sample requests, which are passed on.

    Raises:
        TrainerError: The children cannot be started, or failed. Said as `JobFailed` too.
    """
    folder = job.journal.parent
    reader = _Reader(job.journal)
    try:
        check(job)
        folder.mkdir(parents=True, exist_ok=True)
        configuration.save(job.written, folder / "launched.json")
        asks = folder / "asks.txt"
        atomic_write(asks, "")
        parent = psutil.Process()
        arguments = [str(folder / "launched.json"), "--started", repr(job.started), "--asks", str(asks)]
        arguments += ["--parent", f"{parent.pid}:{parent.create_time()!r}"]
        events.relay(PhaseStarted(phase="start processes"))
        output = folder / "processes.txt"
        with output.open("wb") as lines:
            children = _start(command(job, arguments), job, lines.fileno())
            code = _follow(children, reader, events, controls, asks)
    except (TrainerError, OSError) as error:
        message = str(error) if isinstance(error, TrainerError) else f"no process can be started: {error}"
        _fail(job, events, message, 0)
        raise error if isinstance(error, TrainerError) else ConfigError(message) from error
    match reader.end:
        case JobFinished(step=step, path=path):
            return Outcome(step=step, path=path, state=None, stopped=False)
        case JobStopped(step=step, path=path, state=state):
            return Outcome(step=step, path=path, state=state, stopped=True)
        case JobFailed(message=message):
            raise TrainerError(message)
    if code == 0 and extra(job).get("machine_rank", "0") != "0":
        # The first machine writes the journal and the files.
        events.relay(JobFinished(step=reader.step, path=job.output_dir, elapsed_s=time.time() - job.started))
        return Outcome(step=reader.step, path=None, state=None, stopped=controls.stop.is_set())
    message = _why(folder, output)
    _fail(job, events, message, reader.step)
    raise TrainerError(message)


def _start(words: list[str], job: Job, output: int) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, LAUNCHED: "1"}
    environment.setdefault("OMP_NUM_THREADS", str(max(job.config.num_cpu_threads_per_process, 1)))
    apart: dict[str, Any] = {"start_new_session": True}
    if sys.platform == "win32":
        apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    # Apart, since Ctrl-C in the terminal is the parent's business: it asks the children to save first.
    return subprocess.Popen(
        words,
        cwd=job.base,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        **apart,
    )


def _follow(
    launcher: subprocess.Popen[bytes], reader: _Reader, events: EventLog, controls: Controls, asks: Path
) -> int:
    """Pass events on and requests down until the children have ended; then none of them is left."""
    family: dict[int, psutil.Process] = {}
    stopping = False
    try:
        while True:
            code = launcher.poll()
            reader.pass_on(events)
            if code is not None:
                return code
            _look_up(launcher.pid, family)
            said = []
            if controls.stop.is_set() and not stopping:
                said, stopping = ["stop"], True
            for name in ("save", "sample"):
                asked = getattr(controls, name)
                if asked.is_set():
                    asked.clear()
                    said.append(name)
            if said:
                with asks.open("a", encoding="utf-8") as file:
                    file.write("".join(f"{word}\n" for word in said))
            time.sleep(LOOK_EVERY_S)
    finally:
        _end(launcher, family)
        reader.pass_on(events)


def _look_up(number: int, family: dict[int, psutil.Process]) -> None:
    """Remember the launcher's descendants: if it dies, they cannot be found through it any more."""
    try:
        for process in psutil.Process(number).children(recursive=True):
            family.setdefault(process.pid, process)
    except psutil.Error:
        pass


def _end(launcher: subprocess.Popen[bytes], family: dict[int, psutil.Process]) -> None:
    """End what is left, gently first."""
    _look_up(launcher.pid, family)
    if launcher.poll() is None:
        launcher.terminate()
        try:
            launcher.wait(KILL_AFTER_S)
        except subprocess.TimeoutExpired:
            launcher.kill()
            launcher.wait()
    left = [process for process in family.values() if process.is_running()]
    for process in left:
        try:
            process.kill()
        except psutil.Error:
            continue  # it ended in this moment
    psutil.wait_procs(left, timeout=KILL_AFTER_S)


def _why(folder: Path, output: Path) -> str:
    """One sentence on children that ended without an end of the run."""
    for path in sorted(folder.glob("process-*.jsonl")):
        for event in read_journal(path):
            if isinstance(event, JobFailed):
                return f"training process {path.stem.removeprefix('process-')} failed: {event.message}"
    text = output.read_text(encoding="utf-8", errors="replace")
    codes = [int(code) for code in re.findall(r"exitcode\s*:\s*(-?\d+)", text)]
    killed = next((-code for code in codes if code < 0), 0)
    how = (
        f"was killed (signal {killed}), often a sign of too little memory"
        if killed
        else "ended without a word"
    )
    return f"a training process {how}: what was saved is kept, and {output} holds what it printed last"


def _fail(job: Job, events: EventLog, message: str, step: int) -> None:
    """Say so here, and in the journal that the children can no longer write."""
    failed = JobFailed(message=message, step=step)
    try:
        journal = EventLog(job.journal)
        journal.emit(failed)
        journal.close()
    except OSError:
        pass  # the folder cannot be written, which is what the message says
    events.relay(failed)


# ---- the children ------------------------------------------------------------------------------


def obey(controls: Controls, asks: Path, parent: str, *, is_first: bool) -> None:
    """In a child: do what the parent writes into ``asks``; stop and save once the parent is gone.

    Args:
        controls: Of this process. The processes agree on what is set in any of them.
        asks: The file, a word a line.
        parent: Its process id and time of start, ``id:seconds``.
        is_first: Whether this process also saves and draws samples.
    """
    number, _, born = parent.partition(":")
    flags = {"stop": controls.stop}
    if is_first:
        flags |= {"save": controls.save, "sample": controls.sample}

    def is_there() -> bool:
        try:
            return bool(abs(psutil.Process(int(number)).create_time() - float(born)) < 1)
        except psutil.Error:
            return False

    def look() -> None:
        done = 0
        while is_there():
            try:
                *words, _ = asks.read_text(encoding="utf-8").split("\n")
            except OSError:
                words = []
            for word in words[done:]:
                if word in flags:
                    flags[word].set()
            done = max(done, len(words))
            time.sleep(LOOK_EVERY_S)
        controls.stop.set()

    threading.Thread(target=look, name="asks", daemon=True).start()
