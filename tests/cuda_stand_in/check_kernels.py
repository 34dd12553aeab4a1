"""Compiles the kernels of src/ops/cuda as a run does, without a GPU, and prints what each needs of a multiprocessor.

    CUDA_HOME=/usr/local/cuda python tests/cuda_stand_in/check_kernels.py [FILE.cu …]

Needs a toolkit of CUDA 12 or newer under CUDA_HOME (its libnvrtc and its headers) and nothing but the standard library.
Every file is compiled for compute capability 8.0 and 9.0, with activations in f32 and bf16, attention also for many
sizes of a head, which takes a few minutes. A kernel that does not compile, or whose registers spill to memory, makes the exit status 1.
"""

import ctypes
import os
import re
import sys
from collections import defaultdict
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[2] / "src" / "ops" / "cuda"
ARCHITECTURES = ("sm_80", "sm_90")
REALS = {"f32": "float", "bf16": "__nv_bfloat16"}
# One for each way to cut a head up, one that is copied value by value, and those that models have.
HEAD_DIMS = (16, 22, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)

# What ptxas says of a kernel, in its verbose mode.
ENTRY = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


class Compiler:
    """NVRTC, found under CUDA_HOME (or CUDA_PATH)."""

    def __init__(self):
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        if not home:
            sys.exit("error: CUDA_HOME is not set\n\nhint: set it to a CUDA toolkit")
        self.include = Path(home) / "include"
        folders = [Path(home) / name for name in ("lib64", "lib")]
        libraries = {path for folder in folders for path in folder.glob("libnvrtc*.so*")}
        # NVRTC asks the loader for its built-in functions by name alone: it finds those that are loaded already.
        for path in sorted(libraries):
            if "builtins" in path.name and "alt" not in path.name:
                ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        named = sorted(path for path in libraries if re.fullmatch(r"libnvrtc\.so[.\d]*", path.name))
        if not named:
            sys.exit(f"error: no libnvrtc.so in {folders[0]} or {folders[1]}")
        self.library = ctypes.CDLL(named[-1])

    def compile(self, name, text, options):
        """Returns whether it was accepted, and what the compiler and ptxas said."""
        program, size = ctypes.c_void_p(), ctypes.c_size_t()
        create = self.library.nvrtcCreateProgram(
            ctypes.byref(program), text.encode(), name.encode(), 0, None, None
        )
        if create != 0:
            sys.exit(f"error: NVRTC refused to begin: result {create}")
        options = [*options, f"-I{self.include}", "--ptxas-options=-v"]
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        result = self.library.nvrtcCompileProgram(program, len(options), array)
        self.library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        self.library.nvrtcGetProgramLog(program, log)
        self.library.nvrtcDestroyProgram(ctypes.byref(program))
        return result == 0, log.value.decode()


def variants(text):
    """The definitions that a file is compiled with beside the type of activations: name for the table, options."""
    if "HEAD_DIM" not in text:
        return [("", [])]
    return [(f" ({size})", [f"-DHEAD_DIM={size}"]) for size in HEAD_DIMS]


def check(compiler, path, table, faults):
    """Compiles one file in all ways; adds its kernels to `table` and what is wrong with them to `faults`."""
    text = path.read_text()
    # As the host joins them: a message then names the line of the file.
    joined = f'{(KERNELS / "common.cuh").read_text()}\n#line 1 "{path.name}"\n{text}'
    for suffix, definitions in variants(text):
        for architecture in ARCHITECTURES:
            for real, type_name in REALS.items():
                column = f"{architecture} {real}"
                options = [f"-arch={architecture}", f"-DREAL={type_name}", *definitions]
                accepted, log = compiler.compile(path.name, joined, options)
                said = "\n".join(line for line in log.splitlines() if not line.startswith("ptxas "))
                if said.strip("\n\0 "):
                    print(f"{path.name}{suffix}, {column}:\n{said}", file=sys.stderr)
                if not accepted:
                    faults.append(f"{path.name}{suffix} does not compile for {column}")
                    continue
                for entry in ENTRY.finditer(log):
                    kernel = entry["kernel"] + suffix
                    shared = re.search(r"(\d+) bytes smem", entry["rest"])
                    spilled = max(int(entry[what]) for what in ("stack", "stores", "loads"))
                    table[path.name, kernel][column] = (
                        int(entry["registers"]),
                        spilled,
                        int(shared[1]) if shared else 0,
                    )
                    if spilled:
                        faults.append(f"{kernel} spills {spilled} bytes on {column}")


def print_table(table):
    """One line per kernel: registers per thread in each way it is compiled, spilled bytes, static shared memory."""
    columns = [f"{architecture} {real}" for architecture in ARCHITECTURES for real in REALS]
    widths = [max(8, len(column)) for column in columns]
    heads = "  ".join(column.rjust(width) for column, width in zip(columns, widths))
    print(f"{'registers of':<38}{heads}   spilled   shared memory")
    file = None
    for (name, kernel), found in table.items():
        if name != file:
            file = name
            print(name)
        registers = "  ".join(
            str(found[column][0] if column in found else "-").rjust(width)
            for column, width in zip(columns, widths)
        )
        spilled = max(value[1] for value in found.values())
        shared = max(value[2] for value in found.values())
        print(f"  {kernel:<36}{registers}{spilled:>10}{shared:>16}")


def main():
    chosen = sys.argv[1:]
    files = [path for path in sorted(KERNELS.glob("*.cu")) if not chosen or path.name in chosen]
    missing = set(chosen) - {path.name for path in files}
    if missing or not files:
        sys.exit(f"error: no kernels in {KERNELS / ' '.join(sorted(missing)) if missing else KERNELS}")
    compiler, table, faults = Compiler(), defaultdict(dict), []
    for path in files:
        check(compiler, path, table, faults)
    print_table(table)
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
