"""The rules of CONTRIBUTING.md and the structure that cpp/README.md describes."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CPP = ROOT / "cpp"
LIBRARY = [
    p for p in CPP.rglob("*") if p.suffix in {".h", ".hpp", ".cpp", ".cu", ".cuh", ".def"} and "examples" not in p.parts
]
KERNELS = [p for p in LIBRARY if CPP / "kernels" in p.parents]
PYTHON = list((ROOT / "python/leetcore").rglob("*.py"))
ROWS = re.findall(r"^(CPU|CUDA)\((\w+)\)", (CPP / "methods.def").read_text(), re.M)


def relative(path):
    return path.relative_to(ROOT).as_posix()


def code(path):
    """The text of a C++ file without its comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.S)


def found(pattern, paths):
    return sorted(relative(p) for p in paths if re.search(pattern, code(p)))


def test_there_is_something_to_check():
    assert len(LIBRARY) > 15 and len(KERNELS) >= 3 and len(PYTHON) >= 4 and len(ROWS) >= 3


def test_intrinsics_stay_in_the_primitive_layer():
    allowed = {"cpp/cpu/simd.h", "cpp/cpu/threads.cpp", "cpp/cpu/isa.cpp", "cpp/simt/simt_device.cuh"}
    assert set(found(r"\b_mm\d*_|immintrin|arm_neon|__builtin_ia32|__asm__|\basm\b", LIBRARY)) <= allowed


def test_kernels_have_no_raw_gpu_syntax():
    assert not found(r"threadIdx|__shared__|__syncthreads|<<<", KERNELS)


def test_ptx_stays_in_one_file_and_every_primitive_has_a_contract():
    """`address` needs no contract: the primitives use it, and the emulator does not have it."""
    cuda = [p for p in LIBRARY if p.suffix in {".cu", ".cuh"}]
    assert found(r"\basm\b", cuda) == ["cpp/simt/simt_device.cuh"]
    functions = r"SIMT_DEV (?:void |[\w<>]+ )(\w+)\("
    primitives = {x for name in ("simt.h", "simt_device.cuh") for x in re.findall(functions, code(CPP / "simt" / name))}
    contracts = code(ROOT / "tests/simt/contract_test.cuh")
    assert len(primitives) > 30
    assert not [p for p in primitives - {"address"} if not re.search(rf"\b{p}\b", contracts)]


def test_device_calls_are_launches():
    """A CUDA graph cannot capture calls that allocate, wait or copy through the host."""
    calls = {x for p in LIBRARY for x in re.findall(r"\bcuda[A-Z]\w+(?=\()", code(p))}
    assert "cudaLaunchKernel" in calls
    assert not [x for x in calls if re.search(r"Malloc|Free|Memcpy|Memset|Synchronize|Query|Event|Host", x)]
    assert found(r"\bcuda[A-Z]\w+\(", LIBRARY) == ["cpp/cuda/device.cu", "cpp/simt/simt_device.cuh"]


def test_the_extension_uses_the_c_abi_only():
    includes = re.findall(r'#include\s+["<]([^">]+)[">]', (CPP / "python.cpp").read_text())
    assert [i for i in includes if "leetcore" in i or i.startswith(".") or (CPP / i).exists()] == [
        "leetcore/leetcore.h"
    ]


def test_one_place_refuses_arguments():
    """check.cpp and check_conv.cpp refuse arguments, with the words of checker.h, methods.cpp names
    of methods, api.cpp its own null pointers, and tuning.cpp the text of a table."""
    checks = {"cpp/check.cpp", "cpp/check_conv.cpp", "cpp/checker.h"}
    allowed = checks | {"cpp/methods.cpp", "cpp/api.cpp", "cpp/tuning.cpp"}
    assert set(found(r"fail\(\s*LC_(INVALID|DTYPE)", LIBRARY)) <= allowed


def test_the_library_never_prints_or_exits():
    assert not found(r"\b(printf|puts|fputs|fprintf|abort|exit|_Exit|terminate|assert)\s*\(|std::(cout|cerr)", LIBRARY)


def test_methods_do_not_include_one_another():
    for path in KERNELS:
        for include in re.findall(r'#include\s+"([^"]+)"', path.read_text()):
            target = (path.parent / include).resolve()
            another = CPP / "kernels" in target.parents and target.parent != path.parent
            assert not another, f"{relative(path)} includes {include}"


@pytest.mark.parametrize("device, name", ROWS)
def test_every_row_has_its_folder_its_source_and_a_named_paper(device, name):
    folder = CPP / "kernels" / name
    assert (folder / f"{name}{'.cpp' if device == 'CPU' else '.cu'}").exists()
    assert re.search(r"arXiv:\d{4}\.\d{5}|doi:", (folder / "README.md").read_text())


def test_every_kernel_is_explained():
    headings = "".join(re.findall(r"^## .*$", (ROOT / "docs" / "kernels.md").read_text(), re.M))
    assert not [name for device, name in ROWS if device == "CUDA" and f"`{name}`" not in headings]


def test_every_folder_has_a_row():
    """The convolution is no method of the operator, and has an entry in the table of isa.cpp."""
    assert "conv" in code(CPP / "cpu/isa.cpp")
    assert {p.name for p in (CPP / "kernels").iterdir()} == {name for _, name in ROWS} | {"conv"}


@pytest.mark.parametrize("path", [p for p in KERNELS if p.suffix in {".cpp", ".cu", ".cuh"}], ids=relative)
def test_a_kernel_opens_with_its_idea(path):
    header = re.match(r"(?://[^\n]*\n)+", path.read_text())
    assert header, "no header comment"
    lines = header.group().splitlines()
    assert len(lines) <= 12 and lines[0].startswith(f"// {path.name} - ")
    assert "arXiv:" in header.group() and "flop" in header.group()


def prose(path):
    """The numbers and lines of a file's full-line comments or Markdown paragraphs.

    Tables, code, formulas (indented), headings, links and pictures are not prose.
    """
    mark = {".md": "", ".py": "#", ".cmake": "#", ".txt": "#", ".toml": "#", "": "#"}.get(path.suffix, "//")
    fenced = False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not mark:
            fenced ^= line.lstrip().startswith("```")
            verbatim = fenced or line.startswith(("|", "#", "<", "[!", "![", "    "))
        else:
            comment = re.match(rf"\s*{mark}(?: (.*))?$", line)
            verbatim = not comment or (comment[1] or "").startswith(("  ", "----", "|", "!", "clang-format", "noqa"))
        if not verbatim:
            yield number, line


SUFFIXES = {".h", ".hpp", ".c", ".cpp", ".cu", ".cuh", ".def", ".py", ".md", ".cmake", ".toml"}
FOLDERS = ("cpp", "python/leetcore", "tests", "bench", "examples", "docs", "cmake", ".ci")
TEXTS = [
    p
    for p in (*ROOT.iterdir(), *(p for folder in FOLDERS for p in (ROOT / folder).rglob("*")))
    if p.is_file() and "results" not in p.parts and (p.suffix in SUFFIXES or p.name in {"CMakeLists.txt", "Makefile"})
]


def test_prose_is_wrapped_at_100_columns():
    """The linter checks docstrings (W505). A long link has no space, so it cannot be wrapped."""
    lines = [(p, i, line) for p in TEXTS for i, line in prose(p) if len(line) > 100]
    long = [f"{relative(p)}:{i}" for p, i, line in lines if " " in line.strip("/#- ")]
    assert not long, f"{len(long)} lines, of {len({x.split(':')[0] for x in long})} files: {long[:20]}"


def test_a_long_file_says_why_it_is_one_file():
    programs = [p for p in TEXTS if p.suffix not in {".md", ".toml"}]
    long = [p for p in programs if len(p.read_text().splitlines()) > 500]
    assert len(long) > 5
    assert not [relative(p) for p in long if "one file" not in "".join(p.open().readlines()[:20]).lower()]


def test_array_frameworks_are_imported_where_they_are_served():
    frameworks = r"^\s*(?:import|from)\s+(torch|jax|cupy|ml_dtypes)\b"
    bad = [
        relative(p)
        for p in PYTHON
        if p.name not in {"arrays.py", "files.py"}
        and not relative(p).startswith("python/leetcore/torch/")
        and not relative(p).startswith("python/leetcore/compat/")
        and relative(p) not in {f"python/leetcore/bench/{x}.py" for x in ("problems", "ceilings", "rivals")}
        and re.search(frameworks, p.read_text(), re.M)
    ]
    assert not bad


def test_no_flag_trades_correctness_or_portability():
    files = [ROOT / "CMakeLists.txt", ROOT / "pyproject.toml", *ROOT.glob("*/CMakeLists.txt"), *ROOT.glob("cmake/*")]
    text = "\n".join(p.read_text() for p in files)
    assert not re.search(r"-march=native|-ffast-math|-Ofast|-funsafe-math", text)
