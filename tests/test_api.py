"""The public interface: names, signatures, build information, examples of the documentation."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import leetcore
import pytest

ROOT = Path(__file__).parent.parent


def child(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def test_public_names_exist_and_are_documented():
    for name in leetcore.__all__:
        thing = getattr(leetcore, name)
        assert inspect.getdoc(thing), name
    assert {"linear_attention", "decode_step", "decay", "methods", "explain", "build_info"} <= set(leetcore.__all__)


def test_signatures():
    parameters = inspect.signature(leetcore.linear_attention).parameters
    options = ["scale", "initial_state", "return_state", "cu_seqlens", "layout", "method", "precision", "out", "stream"]
    assert list(parameters) == ["q", "k", "v", "log_decay", *options]
    assert parameters["scale"].default == 1.0 and parameters["method"].default == "auto"
    assert list(inspect.signature(leetcore.decode_step).parameters) == (
        ["q", "k", "v", "state", "log_decay", "scale", "state_indices", "out", "stream"]
    )


def test_methods():
    rows = leetcore.methods()
    assert {"parallel", "recurrent", "chunk"} <= {m.name for m in rows}
    assert all(m.device in ("cpu", "cuda") and m.idea and "arXiv" in m.paper for m in rows)


def test_build_info():
    info = leetcore.build_info()
    assert set(info) == {"version", "compiler", "isa", "isas", "cuda", "threads", "threads_source"}
    assert info["version"] == leetcore.__version__ and info["isa"] in info["isas"].split()


def test_threads_can_be_set_and_restored():
    default = leetcore.num_threads()
    leetcore.set_num_threads(3)
    assert leetcore.num_threads() == 3 and leetcore.build_info()["threads"] == "3"
    leetcore.set_num_threads(0)
    assert leetcore.num_threads() == default


def test_what_c_programs_need_is_installed():
    assert (Path(leetcore.get_include()) / "leetcore/leetcore.h").is_file()
    assert (Path(leetcore.get_include()) / "leetcore/leetcore.hpp").is_file()
    assert (Path(leetcore.get_cmake_dir()) / "leetcoreConfig.cmake").is_file()
    assert (Path(leetcore.__file__).parent / "py.typed").is_file()


def test_explain_marks_one_method():
    import numpy as np

    q = np.ones((1, 8, 4096, 64), np.float32)
    first, *lines = leetcore.explain(q, q, q, -0.1).splitlines()
    assert len(lines) == len(leetcore.methods())
    chosen = leetcore.cost(H=8, N=4096, K=64).method
    assert first == f"the shortest prediction decides: {chosen} (tuning table: shipped)"
    assert [line.split()[1] for line in lines if line.startswith("*")] == [chosen]
    assert "predicted" in lines[0] and "workspace" in lines[0]
    assert leetcore.explain(q[:, :, :1], q[:, :, :1], q[:, :, :1], method="parallel").count("*") == 1


USE = "import leetcore, numpy as np; q = np.ones((1, 1, 9, 4), 'f4'); print(leetcore.explain(q, q, q))"
DECODE = (
    "import leetcore, numpy as np; q = np.ones((1, 1, 4), 'f4'); "
    "leetcore.decode_step(q, q, q, np.ones((1, 1, 4, 4), 'f4'))"
)


def test_environment_method():
    ran = child(USE, LEETCORE_METHOD="parallel")
    assert ran.stdout.startswith("LEETCORE_METHOD names parallel\n") and "* parallel" in ran.stdout
    ran = child(USE, LEETCORE_METHOD="wrong")
    assert ran.returncode and "ValueError: LEETCORE_METHOD: unknown method 'wrong'; known are auto" in ran.stderr
    assert child(DECODE, LEETCORE_METHOD="chunk").returncode == 0  # LEETCORE_METHOD applies to forward passes only


def test_environment_isa_and_threads():
    ran = child("import leetcore; leetcore.methods()", LEETCORE_ISA="mmx")
    assert ran.returncode and "RuntimeError: LEETCORE_ISA: 'mmx' cannot run here" in ran.stderr
    assert "generic" in ran.stderr
    ran = child(
        "import leetcore; print(leetcore.build_info()['isa'], leetcore.num_threads())",
        LEETCORE_ISA="generic",
        LEETCORE_NUM_THREADS="5",
    )
    assert ran.stdout.split() == ["generic", "5"]


def test_importing_is_light():
    ran = child("import sys, leetcore; print(*[m for m in ('torch', 'jax', 'cupy', 'click') if m in sys.modules])")
    assert ran.returncode == 0 and ran.stdout.strip() == ""


def snippets():
    for page in ("README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))):
        for i, block in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)):
            yield pytest.param(block, id=f"{page}-{i}")


@pytest.mark.parametrize("block", list(snippets()))
def test_documentation_runs(block):
    before = set(sys.modules)
    try:
        exec(compile(block, "snippet", "exec"), {})
    finally:  # the modules that a block installs must not change the tests after it
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in ("mamba_ssm", "causal_conv1d"):
                del sys.modules[name]
