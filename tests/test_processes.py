"""leetcore with other users of processes and threads.

Forks, limits, settings that change, Ctrl-C, and the end of a process.

Every test runs a program of its own, as a library meets these things once in the life of a process.
"""

import os
import subprocess
import sys

import pytest

CORES = len(os.sched_getaffinity(0))
SETUP = """
import os, signal, sys, threading, time
import numpy as np
ones = np.ones((2, 8, 512, 64), np.float32)

def right():
    import leetcore
    o = leetcore.linear_attention(ones, ones, ones, -0.1, method="chunk")  # takes some ms
    return abs(o[0, 0, -1, 0] / 672.5332 - 1) < 1e-5
"""


def program(code, **environment):
    """The output of a Python program, which is ended after a minute."""
    run = subprocess.run(
        [sys.executable, "-c", SETUP + code],
        env={k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "LEETCORE_"))} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


# ---- forks

EARLIER = {
    "nobody": "",
    "leetcore": "assert right()",
    "numpy": "a = np.ones((1000, 1000)); a @ a",
    "torch": "import torch; torch.sin(torch.randn(4_000_000))",
    "torch and leetcore": "import torch; torch.sin(torch.randn(4_000_000)); assert right()",
    "leetcore on torch's threads": "import torch, leetcore; assert right()",
}


@pytest.mark.parametrize("earlier", EARLIER)
def test_forked_children_answer(earlier):
    """Three nested forks after threads were used; leetcore is loaded before or after the fork."""
    code = """
def descend(depth):
    good = right() if depth % 2 else True  # every second generation has not called leetcore
    if depth < 4:
        child = os.fork()
        if not child:
            signal.alarm(20)
            os._exit(0 if descend(depth + 1) else 1)
        good = os.waitpid(child, 0)[1] == 0 and good
    return good and right()

print("ok" if descend(0) else "wrong")
"""
    assert program(EARLIER[earlier] + code) == "ok"


def test_workers_of_torch_and_of_multiprocessing():
    code = """
import multiprocessing, torch, leetcore
from torch.utils.data import DataLoader

torch.sin(torch.randn(4_000_000))

class Data(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, i): return right(), leetcore.num_threads()

loader = DataLoader(Data(), num_workers=2, batch_size=None, multiprocessing_context="fork", timeout=30)
assert all(good and threads == 1 for good, threads in loader)  # a worker of DataLoader has one thread
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert all(pool.apply_async(right).get(30) for _ in range(4))
print("ok")
"""
    assert program(code) == "ok"


# ---- how many threads

COUNT = "import leetcore; print(leetcore.num_threads(), leetcore.build_info()['threads_source'], sep=': ')"
ALL = "all"  # the answer without limits: the cores of the affinity, or the quota of this machine


@pytest.mark.skipif(CORES < 2, reason="needs two cores")
@pytest.mark.parametrize(
    "code, environment, answer",
    [
        ("", {"OMP_NUM_THREADS": "1"}, "1: OMP_NUM_THREADS"),
        ("", {"OMP_NUM_THREADS": "1,2"}, "1: OMP_NUM_THREADS"),
        ("", {"OMP_NUM_THREADS": "1000000"}, ALL),
        ("", {"OMP_NUM_THREADS": "many"}, ALL),
        ("", {"OMP_THREAD_LIMIT": "1"}, "1: OMP_THREAD_LIMIT"),
        ("", {"LEETCORE_NUM_THREADS": "3", "OMP_NUM_THREADS": "1"}, "3: LEETCORE_NUM_THREADS"),
        ("import leetcore; leetcore.set_num_threads(5);", {"LEETCORE_NUM_THREADS": "3"}, "5: set_num_threads"),
        (
            "import leetcore; leetcore.num_threads(); os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});",
            {},
            "1: affinity",
        ),
        ("import torch; torch.set_num_threads(1);", {}, "1: the caller's framework"),
        (f"import torch; torch.set_num_threads({CORES});", {"OMP_NUM_THREADS": "1"}, ALL),
        ("import torch, leetcore; torch.set_num_threads(1); leetcore.set_num_threads(2);", {}, "2: set_num_threads"),
        # An OpenMP runtime may pin the calling thread to one core. leetcore still uses all cores.
        ("import torch; torch.sin(torch.randn(4_000_000));", {"OMP_PROC_BIND": "true"}, ALL),
    ],
)
def test_sources_of_the_number_of_threads(code, environment, answer):
    answered = program(code + COUNT + "; assert right()", **environment)
    assert answered == (program(COUNT) if answer == ALL else answer)


@pytest.mark.parametrize("text", ["abc", "-1", "0", "2.5", "99999", "1 "])
def test_a_wrong_number_in_the_environment_is_named_by_every_call(text):
    code = """
import leetcore
for call in (right, leetcore.build_info):
    try: call()
    except RuntimeError as e: print(e)
print(leetcore.num_threads())
"""
    sentence = f"LEETCORE_NUM_THREADS: expected a number from 1 to 4096, got '{text}'"
    assert program(code, LEETCORE_NUM_THREADS=text) == f"{sentence}\n{sentence}\n1"


def test_wrong_numbers_of_threads_are_refused():
    import leetcore

    before = leetcore.num_threads()
    for wrong in (4097, 2**31, 2**70):
        with pytest.raises(ValueError, match=rf"^n: expected at most 4096 threads, or 0 for the default, got {wrong}$"):
            leetcore.set_num_threads(wrong)
    for wrong in (1.5, "2", None, True):
        with pytest.raises(TypeError, match=rf"^n: expected a whole number, got {type(wrong).__name__}$"):
            leetcore.set_num_threads(wrong)
    assert leetcore.num_threads() == before
    leetcore.set_num_threads(-(2**70))
    assert leetcore.num_threads() == before


@pytest.mark.parametrize("torch", ["", "import torch; torch.sin(torch.randn(1_000));"])
@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_NPROC"])
def test_threads_that_cannot_be_made_are_done_without(limit, torch):
    code = """
import resource, leetcore
small = ones[:, :, :2]
leetcore.linear_attention(small, small, small, -0.1)
leetcore.set_num_threads(8)
if "LIMIT" == "RLIMIT_AS":
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (12 << 20),) * 2)  # enough memory for the result, not for all stacks
else:
    if os.getuid() == 0:  # root is exempt from this limit
        os.setgid(23456), os.setuid(23456)
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
print("ok" if right() else "wrong")
"""
    assert program(torch + code.replace("LIMIT", limit, 1), OPENBLAS_NUM_THREADS="1") == "ok"


# ---- settings that change while another thread computes


def test_settings_may_change_at_any_time():
    code = """
import leetcore
sys.setswitchinterval(1e-6)
q = np.random.default_rng(0).standard_normal((1, 4, 300, 32)).astype("f4")
want = {m: leetcore.linear_attention(q, q, q, -0.1, method=m) for m in ("chunk", "scan", "parallel")}
isa = leetcore.build_info()["isa"]
row = " ".join(["9"] * 8)
table = f"isa {isa}\\naxis N 1 4096\\naxis D 8 64\\naxis states 0.5 1\\nfactor chunk 4 {row}\\n"
stop, errors = time.time() + 3, []

def change():
    n = 0
    while time.time() < stop:
        leetcore.set_num_threads(1 + n % 3)
        leetcore.tuning.use(table if n % 2 else None)
        os.environ[f"LEETCORE_X{n % 100}"] = "1" * (n % 50)
        os.environ["LEETCORE_METHOD"] = "nonsense"
        n += 1
        time.sleep(0)

def compute():
    calls = 0
    try:
        while time.time() < stop:
            for method, answer in want.items():
                assert np.array_equal(leetcore.linear_attention(q, q, q, -0.1, method=method), answer)
            leetcore.linear_attention(q, q, q, -0.1)
            leetcore.cost(N=300, K=32)
            calls += 1
        assert calls
    except BaseException as e:
        errors.append(repr(e))

threads = [threading.Thread(target=f) for f in (change, compute, compute)]
for t in threads: t.start()
for t in threads: t.join()
print(errors[:1] or "ok")
"""
    assert program(code) == "ok"


# ---- the end of a call and of a process


def test_a_daemon_thread_in_a_call_does_not_outlive_the_process():
    """Uses numpy, because torch and jax abort a process that ends during a daemon thread's call."""
    code = """
import leetcore
def work(n, method):
    x = ones[:, :, :n]
    while True:
        leetcore.linear_attention(x, x, x, -0.1, method=method)

for n, method in ((512, "parallel"), (8, "auto"), (8, "chunk")):
    threading.Thread(target=work, args=(n, method), daemon=True).start()
time.sleep(0.3)
print("ok")
"""
    for _ in range(5):
        assert program(code) == "ok"


def test_ctrl_c_ends_a_call():
    code = """
import leetcore
q = np.ones((1, 32, 20_000, 64), np.float32)
f = lambda: leetcore.linear_attention(q, q, q, -0.1, method="parallel")  # takes ten seconds
began = time.time()
try:
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    f()
except KeyboardInterrupt:
    print("ok" if time.time() - began < 3 and right() else "late")
"""
    assert program(code) == "ok"


def test_a_handler_that_does_not_raise_lets_the_call_go_on():
    code = """
import leetcore
seen = []
signal.signal(signal.SIGALRM, lambda *_: seen.append(time.time()))
signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
began = time.time()
while len(seen) < 3 and time.time() < began + 30:
    q = np.ones((1, 16, 6000, 64), np.float32)
    o = leetcore.linear_attention(q, q, q, 0.0, method="parallel")
    assert (o[0, :, -1] == 6000 * 64).all()
signal.setitimer(signal.ITIMER_REAL, 0)
print("ok" if len(seen) >= 3 else "handlers did not run")
"""
    assert program(code) == "ok"


def test_a_call_of_another_thread_is_not_interrupted():
    code = """
import leetcore
q = np.ones((1, 16, 6000, 64), np.float32)
answers = []
t = threading.Thread(target=lambda: answers.append(leetcore.linear_attention(q, q, q, 0.0, method="parallel")))
t.start()
time.sleep(0.1)
try:
    os.kill(os.getpid(), signal.SIGINT)
    t.join()
except KeyboardInterrupt:
    t.join()
print("ok" if (answers[0][0, :, -1] == 6000 * 64).all() else "wrong")
"""
    assert program(code) == "ok"
