"""Files of the user: broken tables, complete writes, and the folders of a package."""

import os
import pickle
import shutil
import stat
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import leetcore
import numpy as np
import pytest
from leetcore import files, tuning

COMMAND = Path(sys.executable).with_name("leetcore")
ISA = leetcore.build_info()["isa"]
ROW = " ".join(["1"] * 8)
TABLE = tuning.completed(
    f"{tuning.header()}\nisa {ISA}\naxis N 1 4096\naxis D 8 64\naxis states 0.5 1\n"
    + "".join(f"factor {method} 4 {ROW}\n" for method in ("chunk", "scan"))
)
SOURCE = "import leetcore; print(leetcore.tuning.source)"


def python(code, *options, **environment):
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        env={k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME")} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def leet(*arguments, **options):
    return subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120, **options)


# ---- the table of the cache directory


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """Loads a table with these bytes as an import does: (whether it is used, the warnings)."""
    monkeypatch.setattr(tuning, "path", lambda isa: tmp_path / "table.txt")

    def load(data):
        (tmp_path / "table.txt").write_bytes(data)
        tuning.use(None)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            tuning.load(ISA)
        return tuning.source != "shipped", [str(w.message) for w in warned]

    yield load
    tuning.use(None)


def test_a_whole_table_is_used(loaded):
    assert loaded(TABLE.encode()) == (True, [])


def test_every_beginning_of_a_table_is_named_in_one_warning(loaded):
    for cut in range(len(TABLE)):
        used, warned = loaded(TABLE[:cut].encode())
        assert not used and len(warned) == 1 and "table.txt is not used: " in warned[0], cut


@pytest.mark.parametrize(
    "data",
    [
        b"\0" * 1000,
        b"\xff\xfe nonsense",
        TABLE.encode("utf-16"),
        TABLE.replace("axis D", "axis D\0").encode(),
        TABLE.replace("4096", "4097").encode(),
        TABLE.encode() + b"factor fleet 4 1\n",
        TABLE.encode() * 2,
        b"x" * (2 << 20),
        tuning.completed(f"{tuning.header()}\nfactor chunk 4 1 2 3\n").encode(),
        tuning.completed(f"{tuning.header()}\naxis N 1 \0 2\n").encode(),
    ],
    ids=lambda data: repr(data[:20]),
)
def test_a_table_of_any_bytes_is_named_in_one_warning(loaded, data):
    used, warned = loaded(data)
    assert not used and len(warned) == 1 and "`leetcore tune` writes it again" in warned[0]


def test_a_table_of_another_version_or_machine_says_nothing(loaded):
    assert loaded(tuning.completed("# leetcore 0.0.1\nspeed 3\n").encode()) == (False, [])
    elsewhere = TABLE.splitlines(keepends=True)[1:-1]
    header = f"# leetcore {leetcore.__version__} on another processor\n"
    assert loaded(tuning.completed(header + "".join(elsewhere)).encode()) == (False, [])
    others = tuning.completed(f"{tuning.header()}\nisa another\naxis N 1 2\nfactor chunk 4 1\n")
    assert loaded(others.encode()) == (True, [])  # the table has no lines for this instruction set


@pytest.mark.parametrize("options", [(), ("-W", "error"), ("-X", "dev"), ("-I",), ("-O",)])
def test_an_import_never_fails(tmp_path, options):
    """Any file or folder may be at the path of the table, or at its parents' paths."""
    folder = tmp_path / "leetcore"
    file = folder / f"tuning-{ISA}.txt"

    def broken():
        file.write_bytes(b"\xff")

    def directory():
        file.unlink()
        file.mkdir()

    def loop():
        file.rmdir()
        file.symlink_to(file)

    def pipe():
        file.unlink()
        os.mkfifo(file)

    def no_folder():
        shutil.rmtree(folder)
        folder.write_text("")

    folder.mkdir()
    for i, change in enumerate((broken, directory, loop, pipe, no_folder)):
        change()
        ran = python(SOURCE, *options, XDG_CACHE_HOME=str(tmp_path))
        assert ran.returncode == 0 and ran.stdout == "shipped\n", ran.stderr
        warns = i < 4 and options != ("-W", "error")
        assert ran.stderr.count("is not used") == warns, ran.stderr


@pytest.mark.parametrize("home", [None, "relative", "/nonexistent"])
def test_homes_that_are_none(home):
    environment = {} if home is None else {"HOME": home, "XDG_CACHE_HOME": home}
    code = "import os; os.setgid(23456); os.setuid(23456);" if os.getuid() == 0 else ""
    code = f"import leetcore, leetcore.cli, sys; {code} print(leetcore.tuning.path('x'))"
    ran = python(code, **environment)
    assert ran.returncode == 0 and not ran.stderr
    assert ran.stdout.strip() in (
        ["/nonexistent/leetcore/tuning-x.txt"]
        if home == "/nonexistent"
        else ["None", os.path.join(os.path.expanduser("~"), ".cache/leetcore/tuning-x.txt")]
    )


def test_tune_without_a_home_says_so(monkeypatch):
    from click.testing import CliRunner
    from leetcore.cli import main

    monkeypatch.setattr(tuning, "path", lambda isa: None)
    ran = CliRunner().invoke(main, ["tune"])
    assert ran.exit_code == 1
    assert ran.output == "Error: there is no home directory; name a file with -o, or set XDG_CACHE_HOME\n"


def test_tables_are_read_in_any_locale(tmp_path):
    """Programs set a locale whose decimal point is a comma; strtod would obey it."""
    names = subprocess.run(["locale", "-a"], capture_output=True, text=True).stdout.split()
    for name in {"de_DE.utf8", "tr_TR.utf8", "C.utf8", "C"} & {*names, "C"}:
        code = f"""
import locale, leetcore
locale.setlocale(locale.LC_ALL, {name!r})
leetcore.tuning.use({TABLE!r})
"""
        assert python(code).returncode == 0


# ---- files that are written


def test_readers_see_the_old_file_or_the_new_one(tmp_path):
    target = tmp_path / "file"
    stop = threading.Event()
    seen = set()

    def read():
        while not stop.is_set():
            if target.exists():
                seen.add(target.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(20):
        with files.replacing(target) as out:
            for _ in range(5):
                out.write(b"%02d" % i * 1000)
                out.flush()
                time.sleep(0.0005)
    stop.set()
    reader.join()
    assert seen and all(len(data) == 10_000 and len(set(zip(data[::2], data[1::2], strict=True))) == 1 for data in seen)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("x")])
def test_what_fails_leaves_the_old_file(tmp_path, error):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(type(error)) as raised, files.replacing(target) as out:
        out.write(b"new")
        raise error
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    if isinstance(error, OSError):
        assert raised.value.filename == str(target)


def test_permissions_links_and_devices(tmp_path):
    before = os.umask(0o027)
    try:
        with files.replacing(tmp_path / "new") as out:
            out.write(b"1")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    (tmp_path / "link").symlink_to(tmp_path / "new")
    with files.replacing(tmp_path / "link") as out:
        out.write(b"2")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "new").read_text() == "2"
    with files.replacing("/dev/null") as out:
        out.write(b"3")
    assert Path("/dev/null").is_char_device()


WRITERS = {
    "run": ["run", "in.npz", "-o"],
    "tune": ["tune", "-o"],
    "bench --json": ["bench", "chunk", "--shapes", "1,1,8,8,8", "--rounds", "1", "--json"],
    "check --json": ["check", "chunk", "--json"],
}


@pytest.mark.parametrize("command", WRITERS)
def test_a_target_is_tried_before_the_work(tmp_path, command):
    """Each file is refused at once, with one sentence that names the file as it was given."""
    q = np.ones((1, 1, 4, 4), np.float32)
    files.save(tmp_path / "in.npz", {"q": q, "k": q, "v": q})
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "file").write_text("")
    for target, problem in (
        ("folder.npz", "directory"),
        ("none/out.npz", "No such file or directory"),
        ("file/out.npz", "Not a directory"),
    ):
        began = time.monotonic()
        ran = leet(*WRITERS[command], target, cwd=tmp_path)
        assert ran.returncode and problem in ran.stderr and target in ran.stderr, ran.stderr
        assert "Traceback" not in ran.stderr and "unfinished" not in ran.stderr and time.monotonic() - began < 20
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.npz", "in.npz"]


# ---- where the package is


def test_folders_of_an_editable_install(tmp_path):
    """Python files in one folder and built files in another, as after `pip install -e`."""
    package = Path(leetcore.__file__).parent
    built = ("lib", "lib64", "include")
    source = tmp_path / "sources of ünïcode"
    shutil.copytree(package, source, ignore=shutil.ignore_patterns("*.so", *built, "__pycache__"))
    (tmp_path / "built").mkdir()
    for entry in package.iterdir():
        if entry.suffix == ".so" or entry.name in built:
            (tmp_path / "built" / entry.name).symlink_to(entry)
    code = f"""
import importlib.util, sys
folders = [{str(source)!r}, {str(tmp_path / "built")!r}]
file = folders[0] + "/__init__.py"
spec = importlib.util.spec_from_file_location("leetcore", file, submodule_search_locations=folders)
leetcore = importlib.util.module_from_spec(spec)
sys.modules["leetcore"] = leetcore
spec.loader.exec_module(leetcore)
print(leetcore.get_include())
print(leetcore.get_cmake_dir())
"""
    ran = python(code)
    include, cmake = ran.stdout.splitlines()
    assert (Path(include) / "leetcore/leetcore.h").is_file(), ran.stderr
    assert (Path(cmake) / "leetcoreConfig.cmake").is_file()


def test_a_package_without_its_headers_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(leetcore, "__path__", [str(tmp_path)])
    monkeypatch.setattr(leetcore._core, "__file__", str(tmp_path / "_core.so"))
    with pytest.raises(FileNotFoundError, match=r"^leetcore: expected include next to .*; install leetcore again$"):
        leetcore.get_include()


def test_a_package_without_its_extension_says_so(tmp_path):
    """The module is missing, as in a zip file or with a Python other than the one that built it."""
    package = Path(leetcore.__file__).parent
    shutil.copytree(package, tmp_path / "leetcore", ignore=shutil.ignore_patterns("*.so", "lib", "include", "torch"))
    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path, "leetcore")
    for place in (tmp_path, archive):
        ran = python(f"import sys; sys.path.insert(0, {str(place)!r}); import leetcore")
        assert "ImportError: leetcore: expected the compiled module leetcore._core for this Python" in ran.stderr


def test_reloading():
    code = """
import importlib, pickle, leetcore, numpy as np
q = np.ones((1, 1, 4, 4), np.float32)
leetcore.set_num_threads(3)
importlib.reload(leetcore)
importlib.reload(leetcore.tuning)
assert leetcore.num_threads() == 3 and leetcore.linear_attention(q, q, q)[0, 0, 3, 0] == 16
"""
    ran = python(code, "-W", "error")
    assert ran.returncode == 0, ran.stderr


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="the module _xxsubinterpreters has another name")
def test_subinterpreters_are_refused():
    code = """
import _xxsubinterpreters as interpreters
interpreters.run_string(interpreters.create(), '''
try:
    import leetcore
except ImportError as error:
    print(error)
''')
"""
    ran = python(code)
    assert ran.returncode == 0, ran.stderr
    # From Python 3.12 on, nanobind itself refuses.
    assert "subinterpreter" in ran.stdout, ran.stdout


@pytest.mark.parametrize(
    "thing",
    [
        leetcore.linear_attention,
        leetcore.decode_step,
        leetcore.cost(N=100, K=16),
        leetcore.methods()[0],
        leetcore.Gradients(1, 2, 3, 4, 5),
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_pickles(thing):
    assert pickle.loads(pickle.dumps(thing)) == thing
