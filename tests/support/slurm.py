"""A Slurm of the tests' own: a controller and two nodes, all of them processes of this machine."""

import getpass
import os
import re
import shutil
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path

from tests.support.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]
DAEMONS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
# Nobody is asked for a password, and nothing is confined: what is tested is who starts whom.
CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MailProg=/bin/true
KillWait=5
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_min_interval=100000
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing():
    """The programs of Slurm that this machine lacks."""
    return [name for name in DAEMONS if not shutil.which(name)]


class NoSlurmError(Exception):
    """Slurm is installed, but its daemons do not come up; says what they print."""


class Slurm:
    """It runs within a `with`. The names of its nodes, n1 and n2, resolve nowhere."""

    def __init__(self, folder):
        self.folder = Path(folder)
        for name in ("state", "n1", "n2"):
            (self.folder / name).mkdir()
        sockets = [socket.create_server(("", 0)) for _ in range(3)]
        ports = [s.getsockname()[1] for s in sockets]
        for s in sockets:
            s.close()
        host, user = socket.gethostname().split(".")[0], getpass.getuser()
        config = CONFIG.format(host=host, user=user, ports=ports, folder=self.folder)
        (self.folder / "slurm.conf").write_text(config)
        # A job takes over the variables of whoever submits it.
        self.environ = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self._stack = ExitStack()

    def __enter__(self):
        with ExitStack() as stack:
            self._daemon(stack, "slurmctld", "-D")
            for name in ("n1", "n2"):
                self._daemon(stack, "slurmd", "-D", "-N", name)
            try:
                wait_for(lambda: self.call("sinfo", "-h", "-o", "%T %D", check=False) == "idle 2")
            except AssertionError as error:
                raise NoSlurmError((self.folder / "daemons.log").read_text()[-500:]) from error
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc):
        try:  # a test that failed may have left its job
            self.call("scancel", f"--user={getpass.getuser()}", check=False)
            wait_for(lambda: not self.call("squeue", "-h", check=False))
        finally:
            self._stack.close()

    def _daemon(self, stack, *command):
        log = stack.enter_context((self.folder / "daemons.log").open("a"))
        process = subprocess.Popen(command, env=self.environ, stdout=log, stderr=log)
        stack.callback(process.wait)
        stack.callback(process.terminate)

    def call(self, *command, check=True, **variables):
        """What one of Slurm's commands prints."""
        environ = {**self.environ, **variables}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, script, *options, **variables):
        """The job's number."""
        output = f"--output={self.folder}/%j.out"
        environ = {name: str(value) for name, value in variables.items()}
        return self.call("sbatch", "--parsable", output, *options, str(script), **environ)

    def log(self, job):
        path = self.folder / f"{job}.out"
        return path.read_text() if path.exists() else ""

    def wait_while(self, job, *states, seconds=600):
        """Returns the first state, such as COMPLETED, that is none of these.

        A job that has been requeued would wait for two minutes, which are cut short here: to two
        seconds, because nodes refuse a start in the very second in which they ended the last one.
        """
        hurried = {"0"}

        def other():
            shown = self.call("scontrol", "show", "job", job)
            state, restarts = (
                re.search(rf"\b{key}=(\w+)", shown)[1] for key in ("JobState", "Restarts")
            )
            if state == "PENDING" and restarts not in hurried:
                hurried.add(restarts)
                self.call("scontrol", "update", f"JobId={job}", "StartTime=now+2")
            return state if state not in (*states, "COMPLETING", "CONFIGURING") else None

        return wait_for(other, seconds)
