"""The command line, as a shell sees it."""

import re
import subprocess
import sys
from pathlib import Path

import leetcore
import ml_dtypes
import numpy as np
import pytest
from leetcore import files

COMMAND = Path(sys.executable).with_name("leetcore")


def leet(*arguments, **options):
    return subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120, **options)


def inputs(dtype=np.float32):
    rng = np.random.default_rng(0)
    given = {name: rng.standard_normal((1, 2, 9, 8)).astype(dtype) for name in "qkv"}
    return given | {"log_decay": np.float32([-0.1, -1])}


def test_info_says_what_a_bug_report_needs():
    ran = leet("info")
    facts = dict(line.split(": ", 1) for line in ran.stdout.splitlines())
    assert ran.returncode == 0 and not ran.stderr
    build = leetcore.build_info()
    assert facts["leetcore"].startswith(leetcore.__version__) and facts["compiler"] == build["compiler"]
    assert facts["instruction set"] == f"{build['isa']} of {build['isas']}"
    assert facts["numpy"] == np.__version__ and facts["python"].startswith(sys.version.split()[0])
    assert all(m.name in facts["methods"] for m in leetcore.methods())
    assert {"threads", "torch", "jax", "platform", "processor", "environment"} <= set(facts)


def test_version_and_help():
    assert leetcore.__version__ in leet("--version").stdout
    shown = leet("--help").stdout
    assert "info" in shown and "run" in shown


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("source", ["in.npz", "in.safetensors"])
@pytest.mark.parametrize("target", ["out.npz", "out.safetensors"])
def test_run(tmp_path, source, target, dtype):
    given = inputs(dtype)
    files.save(tmp_path / source, given)
    ran = leet("run", tmp_path / source, "-o", tmp_path / target, "--state", "--method", "chunk", "--scale", "0.5")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    got = files.load(tmp_path / target)
    o, state = leetcore.linear_attention(**given, scale=0.5, method="chunk", return_state=True)
    assert set(got) == {"o", "final_state"} and got["o"].dtype == dtype
    assert np.array_equal(got["o"], o) and np.array_equal(got["final_state"], state)
    assert {p.name for p in tmp_path.iterdir()} == {source, target}


def test_run_with_everything(tmp_path):
    rng = np.random.default_rng(0)
    given = {name: rng.standard_normal((1, 9, 2, 8)).astype(np.float32) for name in "qkv"}
    given["log_decay"] = -rng.random((1, 9, 2)).astype(np.float32)
    given["initial_state"] = rng.standard_normal((2, 2, 8, 8)).astype(np.float32)
    given["cu_seqlens"] = np.array([0, 4, 9])
    files.save(tmp_path / "in.safetensors", given)
    ran = leet(
        "run",
        tmp_path / "in.safetensors",
        "-o",
        tmp_path / "out.npz",
        "--layout",
        "bnhd",
        "--threads",
        1,
        "--method",
        "chunk",
    )
    assert ran.returncode == 0, ran.stderr
    assert set(np.load(tmp_path / "out.npz")) == {"o"}
    assert np.array_equal(
        np.load(tmp_path / "out.npz")["o"], leetcore.linear_attention(**given, layout="bnhd", method="chunk")
    )


def test_a_number_as_decay(tmp_path):
    given = inputs() | {"log_decay": np.float32(-0.5)}
    for name in ("in.npz", "in.safetensors"):
        files.save(tmp_path / name, given)
        assert files.load(tmp_path / name)["log_decay"].shape == ()
        assert leet("run", tmp_path / name, "-o", tmp_path / "out.npz").returncode == 0
        assert np.array_equal(np.load(tmp_path / "out.npz")["o"], leetcore.linear_attention(**given))


def test_bfloat16_needs_no_torch(tmp_path):
    files.save(tmp_path / "in.safetensors", inputs(ml_dtypes.bfloat16))
    code = "import sys; sys.modules['torch'] = None; from leetcore.cli import main; main()"
    command = [sys.executable, "-c", code, "run", tmp_path / "in.safetensors", "-o", tmp_path / "out.safetensors"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert files.load(tmp_path / "out.safetensors")["o"].dtype == ml_dtypes.bfloat16


def test_files_of_torch_are_read(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {name: torch.randn(1, 2, 9, 8, dtype=torch.bfloat16) for name in "qkv"}
    save_file(tensors, tmp_path / "in.safetensors")
    assert leet("run", tmp_path / "in.safetensors", "-o", tmp_path / "out.safetensors").returncode == 0
    assert torch.equal(load_file(tmp_path / "out.safetensors")["o"], leetcore.linear_attention(**tensors))


def write(name, **changes):
    def make(folder):
        given = {k: x for k, x in (inputs() | changes).items() if x is not None}
        files.save(folder / name, given)

    return make


def raw(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def one_array(folder):
    with open(folder / "in.npz", "wb") as file:
        np.save(file, np.ones(3))


def pickled(folder):
    np.savez(folder / "in.npz", q=np.array([None]))


REFUSED = {
    "no file": (lambda folder: None, ["in.npz"], r"in\.npz: No such file"),
    "unknown key": (
        write("in.npz", log_decya=np.ones(2)),
        ["in.npz"],
        r"unknown log_decya; allowed are q, k, v, log_decay",
    ),
    "no v": (write("in.safetensors", v=None), ["in.safetensors"], r"in\.safetensors: no v; it has "),
    "shape": (write("in.npz", k=np.ones((1, 2, 8, 8), "f4")), ["in.npz"], r"k: expected shape .*got \[1, 2, 8, 8\]"),
    "dtype": (write("in.npz", q=np.ones((1, 2, 9, 8), int)), ["in.npz"], r"q: expected dtype .*got int64"),
    "stored dtype": (write("in.safetensors", q=np.ones(3, "u1")), ["in.safetensors"], r"q: expected dtype .*got U8"),
    "growth": (write("in.npz", log_decay=np.float32([0, 1])), ["in.npz"], r"log_decay: expected values <= 0, got 1"),
    "ending": (raw("in.pt", b""), ["in.pt"], r"in\.pt: expected a name that ends in \.npz or \.safetensors"),
    "no archive": (raw("in.npz", b"text"), ["in.npz"], r"in\.npz: no readable \.npz file"),
    "empty": (raw("in.npz", b""), ["in.npz"], r"in\.npz: no readable \.npz file"),
    "broken zip": (raw("in.npz", b"PK\x03\x04 and no more"), ["in.npz"], r"in\.npz: no readable \.npz file"),
    "one array": (one_array, ["in.npz"], r"in\.npz: no readable \.npz file \(one array"),
    "pickled": (pickled, ["in.npz"], r"in\.npz: no readable \.npz file"),
    "broken": (raw("in.safetensors", b"\x05"), ["in.safetensors"], r"in\.safetensors: no readable \.safetensors file"),
    "folder": (lambda folder: (folder / "in.npz").mkdir(), ["in.npz"], r"in\.npz: Is a directory"),
    "method": (write("in.npz"), ["in.npz", "--method", "fast"], r"method: unknown method 'fast'; known are auto"),
    "scale": (write("in.npz"), ["in.npz", "--scale", "nan"], r"scale: expected a finite number, got -?nan"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_errors_are_one_sentence(tmp_path, case):
    make, arguments, text = REFUSED[case]
    make(tmp_path)
    before = {p.name for p in tmp_path.iterdir()}
    ran = leet("run", *arguments, "-o", "out.npz", cwd=tmp_path)
    assert ran.returncode == 1 and ran.stdout == ""
    assert ran.stderr.startswith("Error: ") and ran.stderr.count("\n") == 1
    assert re.search(text, ran.stderr), ran.stderr
    assert {p.name for p in tmp_path.iterdir()} == before  # no output, whole or part


@pytest.mark.parametrize(
    "options", [["--layout", "nbhd"], ["--threads", "0"], ["--scale", "x"], ["--fast"]], ids=" ".join
)
def test_wrong_options_are_refused(tmp_path, options):
    write("in.npz")(tmp_path)
    ran = leet("run", "in.npz", "-o", "out.npz", *options, cwd=tmp_path)
    assert ran.returncode == 2 and "Traceback" not in ran.stderr and options[0] in ran.stderr


@pytest.mark.parametrize(
    "target, text", [("out.txt", "ends in .npz or .safetensors"), ("none/out.npz", "No such file")]
)
def test_outputs_that_cannot_be_written(tmp_path, target, text):
    write("in.npz")(tmp_path)
    ran = leet("run", "in.npz", "-o", target, cwd=tmp_path)
    assert ran.returncode == 1 and target.split("/")[-1] in ran.stderr and text in ran.stderr
