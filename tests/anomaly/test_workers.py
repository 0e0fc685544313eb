"""Worker processes that die, hang, shout or close their files: no more is lost than the batch that ran in one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from doorstep.errors import DoorstepError, ErrorCode, FailureReason
from doorstep.testing.python_models import SECONDS, PythonModel, request

# `x` says what to do; 0 answers 0.
TROUBLE = """
import ctypes, os, signal, sys, threading, time
from pathlib import Path
import doorstep
HERE = Path(__file__).parent
class Model(doorstep.Model):
    def predict(self, x: int, text: str = "") -> int:
        if x:
            exec(text)
        return x
"""


def trouble(tmp_path: Path, source: str = TROUBLE, **rest) -> PythonModel:
    return PythonModel(tmp_path / "trouble", source, **rest)


def text_of(code: str) -> np.ndarray:
    array = np.empty(1, object)
    array[0] = code.encode()
    return array


def do(served: PythonModel, code: str) -> None:
    served(x=np.array([1]), text=text_of(code))


def works(served: PythonModel) -> bool:
    return served(x=np.array([0]))["output"].tolist() == [0]


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("os._exit(7)", "exit code 7"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL"),
        ("ctypes.string_at(0)", "killed by SIGSEGV"),
        ("os.abort()", "killed by SIGABRT"),
        ("os.closerange(3, 200); time.sleep(600)", "killed by SIGKILL"),
        ("[os.write(int(fd), b'garbage' * 100) for fd in os.listdir('/proc/self/fd')"
         " if 'socket' in os.path.realpath('/proc/self/fd/' + fd)]; time.sleep(600)", "killed by SIGKILL"),
    ],
)  # fmt: skip
def test_a_batch_whose_process_dies_gets_an_error_and_the_next_one_an_answer(tmp_path, code, how):
    with trouble(tmp_path) as served:
        pid = served.worker.pid
        with pytest.raises(DoorstepError) as error:
            do(served, code)
        assert error.value.message == (
            "Failed to process the request(s) for model instance 'trouble_0', message: Stub process 'trouble_0' is not "
            f"healthy. It ended ({how}) while it ran this request and is being restarted."
        )
        assert (error.value.code, error.value.reason) == (ErrorCode.INTERNAL, FailureReason.BACKEND)
        assert works(served)  # waits for the new process
        assert served.worker.pid != pid
        assert served.restarts == 1
        assert not psutil.pid_exists(pid)


def test_a_process_killed_between_batches_costs_no_request(tmp_path):
    with trouble(tmp_path) as served:
        assert works(served)
        os.kill(served.worker.pid, signal.SIGKILL)
        assert works(served)
        served.wait_for_line("is being restarted")


def test_a_result_sent_before_the_end_still_counts(tmp_path):
    source = """
import os, threading, time, doorstep
class Model(doorstep.Model):
    def predict(self, x: int) -> int:
        if x:
            threading.Thread(target=self.end).start()
        return x
    def end(self):
        main = threading.main_thread()
        os.kill(os.getpid(), 9)
"""
    with trouble(tmp_path, source) as served:
        for x in (1, 0, 1, 0):
            (result,) = served.run(request({"x": np.array([x])}))
            assert isinstance(result, DoorstepError) or result[0].array.tolist() == [x]
        served.wait_for(lambda: served.restarts >= 1)


@pytest.mark.parametrize(
    "code",
    [
        "sys.stdout.write('x' * 20_000_000); sys.stdout.flush()",
        "[print('line', i) for i in range(100_000)]",
        "os.close(0); os.close(1); os.close(2)",
        "sys.stdin.read()",
        "sys.stdout = sys.stderr = None",
        "threading.Thread(target=time.sleep, args=(600,)).start()",
        "import json, socket, struct; json.loads = json.dumps = struct.unpack = socket.socket = None",
        "import builtins; builtins.print = None",
        "os.chdir('/'); os.environ.clear()",
        "os.fork() or os._exit(0)",
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
        "sys.setrecursionlimit(50)",
    ],
)
def test_bad_manners_cost_nobody_anything(tmp_path, code):
    with trouble(tmp_path) as served:
        do(served, code)
        for _ in range(3):
            assert works(served)
        assert served.restarts == 0
        pid = served.worker.pid
    assert not psutil.pid_exists(pid)


def test_a_copy_of_the_process_that_returns_from_predict_says_nothing(tmp_path):
    with trouble(tmp_path) as served:
        do(served, "os.fork()")
        for _ in range(3):
            assert works(served)
        assert served.restarts == 0


def test_what_it_prints_is_in_the_log_but_not_without_bound(tmp_path):
    with trouble(tmp_path) as served:
        do(served, "print('to stdout'); print('to stderr', file=sys.stderr); print('y' * 100_000)")
        served.wait_for_line("(line cut)")
        served.wait_for_line("to stderr")
        assert ("INFO", "trouble_0 | to stdout") in served.lines
        assert ("WARNING", "trouble_0 | to stderr") in served.lines
        assert max(len(line) for _, line in served.lines) < 9000
        do(served, "[print(i) for i in range(20_000)]")
        served.wait_for_line("lines not shown")
        assert len(served.lines) < 5000


def test_control_characters_do_not_reach_the_log(tmp_path):
    with trouble(tmp_path) as served:
        do(served, r"print('\x1b[31mred\x1b[0m\x07'); print('10%\r100%')")
        served.wait_for_line("100%")
        assert [line for _, line in served.lines] == [r"trouble_0 | \x1b[31mred\x1b[0m\x07", "trouble_0 | 100%"]


def test_a_process_that_keeps_dying_is_restarted_more_and_more_slowly(tmp_path):
    with trouble(tmp_path) as served:
        with pytest.raises(DoorstepError, match="exit code 1"):
            do(served, "os._exit(1)")
        with pytest.raises(DoorstepError, match="exit code 2"):
            do(served, "os._exit(2)")
        with pytest.raises(DoorstepError, match=r"trouble_0.*exit code 2.*next attempt in 0\.[12]") as error:
            works(served)  # refused at once, not held
        assert error.value.code is ErrorCode.UNAVAILABLE
        served.wait_for_line("is ready", count=2)
        assert works(served)


def test_a_process_that_cannot_be_loaded_again_says_why_until_it_can(tmp_path):
    with trouble(tmp_path) as served:
        file = served.folder / "1" / "model.py"
        good = file.read_text()
        file.write_text("import no_such_package\n")
        with pytest.raises(DoorstepError, match="exit code 1"):
            do(served, "os._exit(1)")
        with pytest.raises(DoorstepError, match="pip install no_such_package"):
            works(served)
        file.write_text(good)
        served.wait_for_line("is ready")
        assert works(served)


def test_model_code_sees_that_a_request_is_cancelled(tmp_path):
    source = """
import time
import numpy as np
import triton_python_backend_utils as pb_utils
class TritonPythonModel:
    def execute(self, requests):
        print("running", flush=True)
        while not requests[1].is_cancelled():
            time.sleep(0.001)
        said = [int(r.is_cancelled()) for r in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("Y", np.array(said))]) for r in requests]
"""
    config = 'output { name: "Y" data_type: TYPE_INT64 dims: -1 }'
    with trouble(tmp_path, source, config=config) as served:
        cancelled = []
        first, second = request({}), request({})
        second.on_cancel = cancelled.append
        batch = served.submit(first, second)
        served.wait_for_line("running")
        served.on_loop(second.cancel)
        results = batch.result(SECONDS).results
        assert results[0][0].array.tolist() == [0, 1]
        assert cancelled == [second]  # whoever had the request hears of it as before
        assert second.on_cancel == cancelled.append
        later = served.submit(request({}), already := request({}))
        served.wait_for_line("running", count=2)
        served.on_loop(already.cancel)
        assert later.result(SECONDS).results[0][0].array.tolist() == [0, 1]


# Loading


def test_a_model_that_hangs_while_it_loads_is_ended_and_says_where(tmp_path):
    source = "import time\ndef wait():\n    time.sleep(600)\nprint('waiting')\nwait()\n"
    with pytest.raises(
        DoorstepError, match=r"did not load within 1 s .*load-timeout-seconds.*model.py.*line 3 in wait"
    ):
        trouble(tmp_path, source, settings={"load-timeout-seconds": "1"})


def test_a_model_that_dies_while_it_loads_says_its_last_words(tmp_path):
    source = "import os, sys\nprint('goodbye', file=sys.stderr, flush=True)\nos._exit(9)\n"
    with pytest.raises(DoorstepError, match=r"ended: exit code 9; its last output: goodbye"):
        trouble(tmp_path, source)


def test_a_model_that_prints_megabytes_while_it_loads_still_loads(tmp_path):
    with trouble(tmp_path, TROUBLE + "for i in range(50_000): print('loading', i)\n") as served:
        assert works(served)


def test_a_wrong_time_limit_is_refused_by_name(tmp_path):
    with pytest.raises(DoorstepError, match="stub-timeout-seconds=soon: expected a number of seconds"):
        trouble(tmp_path, settings={"stub-timeout-seconds": "soon"})


# Ends


def test_closing_ends_a_process_that_will_not_go(tmp_path):
    source = TROUBLE + "    def unload(self):\n        while True: time.sleep(600)\n"
    served = trouble(tmp_path, source, settings={"unload-timeout-seconds": "0.2"})
    do(served, "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ignores', flush=True)")
    pid = served.worker.pid
    served.close()
    assert not psutil.pid_exists(pid)
    assert any("does not unload" in line for _, line in served.lines)


def test_closing_ends_what_the_process_has_started(tmp_path):
    served = trouble(tmp_path)
    do(served, "import subprocess; print('child', subprocess.Popen(['sleep', '600']).pid, flush=True)")
    served.wait_for_line("child")
    (child,) = [int(line.split()[-1]) for _, line in served.lines if "child" in line]
    served.close()
    psutil.wait_procs([psutil.Process(child)] if psutil.pid_exists(child) else [], timeout=SECONDS)
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_the_process_inherits_no_descriptor_but_ours(tmp_path):
    secret = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(secret, True)
    try:
        with trouble(tmp_path) as served:
            do(
                served,
                "print(sorted(os.readlink(f'/proc/self/fd/{f}') for f in os.listdir('/proc/self/fd') if f != '3'"
                " and os.path.exists(f'/proc/self/fd/{f}')), flush=True)",
            )
            served.wait_for_line("[")
            (line,) = [line for _, line in served.lines if "[" in line]
            assert line.count("/dev/null") == 1  # its stdin
    finally:
        os.close(secret)


def test_worker_processes_end_with_the_server_however_it_ends(tmp_path):
    (tmp_path / "m" / "1").mkdir(parents=True)
    script = f"""
import sys, time
from pathlib import Path
from doorstep.testing.python_models import PythonModel, request
import numpy as np
served = PythonModel(Path({str(tmp_path / "m")!r}), {TROUBLE!r})
busy = np.empty(1, object); busy[0] = b"print('busy', flush=True)\\nwhile True: pass"
served.submit(request({{"x": np.array([1]), "text": busy}}))
served.wait_for_line("busy")
print(served.worker.pid, flush=True)
time.sleep(600)
"""
    server = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        worker = psutil.Process(int(server.stdout.readline()))
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
    gone, alive = psutil.wait_procs([worker], timeout=SECONDS)
    assert gone == [worker], alive


def test_large_tensors_give_their_memory_back(tmp_path, monkeypatch):
    monkeypatch.setattr("doorstep.workers.link.UNUSED_SECONDS", 2.0)
    source = """
import doorstep, numpy as np, numpy.typing as npt
class Model(doorstep.Model):
    def predict(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return x + 1
"""
    with trouble(tmp_path, source) as served:
        out = served(x=np.zeros(4_000_000, np.float32))["output"]
        assert out[-1] == 1
        link = served.worker._link
        assert len(link._outputs) == 1  # `out` is a view on it
        del out
        while len(link._inputs) or len(link._outputs):
            assert served(x=np.zeros(4, np.float32))["output"].tolist() == [1] * 4
        served(x=np.zeros(4, np.float32))  # answered after the process has heard which segments are no more
        maps = Path(f"/proc/{served.worker.pid}/maps").read_text()
        assert "doorstep-inputs" not in maps
        assert "doorstep-outputs" not in maps
        assert served(x=np.zeros(100_000, np.float32))["output"][-1] == 1
