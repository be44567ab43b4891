"""Checks the kernels of CUDA binaries without a GPU: python gates.py BINARY...

Every kernel, on every architecture, must have no spills (no stack frame, no local memory; see
SPILLED), no static shared memory, registers for kMaxThreads threads and kMinBlocks blocks, and the
instructions that it was written for (MEANT). The program reads cuobjdump's listings of the code,
and of the PTX for the launch bounds, so the build needs at least one virtual architecture.
"""

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

REGISTERS, REGISTERS_OF_A_THREAD = 65536, 255  # of a processor, on all architectures
RESERVED = {"sm_80": 0, "sm_90a": 1024}  # bytes of a block's shared memory that the system uses

# Bytes of local memory that kernels may have, by a pattern in their name. These are gradient walks
# that are short of registers, where a few numbers of the state stay in the L1 cache. Aim 1 and 2:
# gradients, decays (cuda/walk/walk.h).
SPILLED = {r"ChunkWalk<.*, 256, 16, .*[12]>": 24, r"ChunkWalk<float, float, 128, 16, .*2>": 24}

# Kernels by a pattern in their name, and the instructions that they must contain.
#   HMMA: the matrix unit; LDSM: ldmatrix; LDGSTS: cp.async; SHFL: a shuffle;
#   MUFU.EX2: ex2.approx; DFMA: float64
MEANT = {
    r"RecurrentForward<": {"SHFL"},
    r"RecurrentForward<double>": {"DFMA"},
    r"ChunkWalk<": {"HMMA", "LDGSTS"},
    r"ChunkWalk<simt::(bf16|f16)": {"LDSM"},
    r"Parallel<": {"LDS.128"},  # a load has four ranks, tokens or columns
    r"Parallel<double": {"DFMA"},
    r"FleetForward<": {"LDS.128"},  # a load has four ranks, or two of float64
    r"FleetForward<double": {"DFMA"},
    r"MatrixUnit": {"HMMA"},  # contract_test.cuh, and faulty.cu, which has none
    r"contract::Ldmatrix": {"LDSM"},
    r"contract::CpAsync": {"LDGSTS"},
    r"contract::Ex2<float>": {"MUFU.EX2"},
}


def tool(name):
    """The path of a tool, from the package nvidia-cuda-NAME or from a toolkit."""
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path}:
        path = Path(folder) / "nvidia/cu13/bin" / name
        if path.exists():
            return str(path)
    found = shutil.which(name)
    if not found:
        sys.exit(f"{name} is missing: pip install nvidia-cuda-{name}")
    return found


def listing(binary, *options):
    done = subprocess.run([tool("cuobjdump"), *options, str(binary)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"cuobjdump {' '.join(options)} {binary}: {done.stderr.strip()}")
    return done.stdout


def short_names(kernels):
    """{mangled: "lc::cuda::RecurrentForward<float>"}."""
    mangled = sorted(kernels)
    done = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    names = [re.sub(r"^void simt::entry<(.*)>\(.*", r"\1", line) for line in done.stdout.splitlines()]
    return dict(zip(mangled, names, strict=True))


def resources(text):
    """{(architecture, kernel): {"REG": .., "STACK": .., "SHARED": .., "LOCAL": ..}} of
    --dump-resource-usage.
    """
    found, architecture, kernel = {}, None, None
    for line in text.splitlines():
        if m := re.match(r"arch = (\w+)", line):
            architecture = m[1]
        elif m := re.match(r"\s*Function (\S+):", line):
            kernel = m[1]
        elif "REG:" in line:
            found[architecture, kernel] = {key: int(x) for key, x in re.findall(r"([A-Z]+):(\d+)", line)}
    return found


def launch_bounds(ptx):
    """{kernel: (threads, blocks)} of the PTX."""
    found = {}
    for kernel, head in re.findall(r"\.entry (\S+?)\((.*?)\{", ptx, re.S):
        threads = re.search(r"\.maxntid (\d+)", head)
        blocks = re.search(r"\.minnctapersm (\d+)", head)
        found[kernel] = (int(threads[1]) if threads else None, int(blocks[1]) if blocks else 1)
    return found


def instructions(sass):
    """{(architecture, kernel): names of instructions}, with and without the first modifier."""
    found, architecture, names = {}, None, set()
    for line in sass.splitlines():
        if m := re.match(r"\s*code for (\w+)", line):
            architecture = m[1]
        elif m := re.match(r"\s*Function : (\S+)", line):
            names = found.setdefault((architecture, m[1]), set())
        elif m := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)((?:\.\w+)?)", line):
            names |= {m[1], m[1] + m[2]}
    return found


def problems(used, bounds, code):
    """One line for each property that a kernel lacks."""
    short = short_names({kernel for _, kernel in used})
    for (architecture, kernel), r in sorted(used.items()):
        at = f"{short[kernel]} on {architecture}:"
        names = code.get((architecture, kernel), set())
        allowed = max((n for pattern, n in SPILLED.items() if re.search(pattern, short[kernel])), default=0)
        if r["STACK"] > allowed or r["LOCAL"] or (not allowed and names & {"LDL", "STL"}):
            yield f"{at} spills: a stack frame of {r['STACK']} bytes, {r['LOCAL']} bytes of local memory"
        if (own := r["SHARED"] - RESERVED[architecture]) > 0:
            yield f"{at} {own} bytes of static shared memory: kernels have the launch's alone"
        threads, blocks = bounds.get(kernel, (None, 1))
        if not threads:
            yield f"{at} no launch bounds in the PTX: no virtual architecture was built, or the kernel has none"
        else:
            warps = -(-threads // 32) * blocks
            share = min(REGISTERS // (32 * warps) // 8 * 8, REGISTERS_OF_A_THREAD)
            if r["REG"] > share:
                yield f"{at} {r['REG']} registers, {share} are there for {blocks} blocks of {threads} threads"
        if not names:
            yield f"{at} no code was found"
        for pattern, meant in MEANT.items():
            if re.search(pattern, short[kernel]) and not meant <= names:
                yield f"{at} has no {', '.join(sorted(meant - names))}"


def main(binaries):
    bad, kernels, missing = 0, 0, set(MEANT)
    for binary in binaries:
        used = resources(listing(binary, "--dump-resource-usage"))
        if not used:
            sys.exit(f"{binary}: has no kernels")
        code = instructions(listing(binary, "-sass"))
        for problem in problems(used, launch_bounds(listing(binary, "-ptx")), code):
            print(problem)
            bad += 1
        kernels += len(used)
        names = short_names({kernel for _, kernel in used}).values()
        missing = {pattern for pattern in missing if not any(re.search(pattern, x) for x in names)}
    for pattern in sorted(missing):
        print(f"{pattern}: no kernel of this name")
        bad += 1
    print(f"{kernels} kernels, {bad} problems")
    return bad != 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
