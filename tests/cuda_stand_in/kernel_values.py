"""Runs the kernels of src/ops/cuda on the stand-in device and compares what they write with PyTorch in f64.

    python tests/cuda_stand_in/kernel_values.py [PART …]

Needs g++, numpy and torch. The parts are the functions `check_…` below. Each launch is also repeated with threads and
blocks in the opposite order, which must give the same bits. What PyTorch does not have (dropout's mask, the roundings
of AdamW and of the verdict before it) is compared, to the bit, with a transcription of the CPU's code. Attention has
tests of its own.
"""

import ctypes
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "src" / "ops" / "cuda"
REALS = {torch.float32: "float", torch.bfloat16: "__nv_bfloat16"}
# A size of one value, odd ones, ones with rows at multiples of 16 bytes, one that no block keeps in registers.
FEATURES = (1, 7, 65, 128, 576, 1009, 4096, 20_000)
BUILT = tempfile.TemporaryDirectory()

LAUNCH = """
extern "C" void stand_in_run(
    const char* name, unsigned x, unsigned y, unsigned threads, unsigned deep, void** parameters, unsigned count
) {
    const stand_in::Kernel* kernel = stand_in::find(name);
    if (!kernel || kernel->parameters != count) std::abort();
    stand_in::launch(*kernel, dim3(x, y), dim3(threads, deep), 0, parameters);
}
"""


@cache
def library(file, real):
    """The kernels of a file as a shared library with `stand_in_run`."""
    text = (KERNELS / file).read_text()
    names = re.findall(r'extern "C" __global__ void(?:\s+__launch_bounds__\([^)]*\))?\s+(\w+)\(', text)
    source = Path(BUILT.name) / f"{file}.{REALS[real]}.cpp"
    registered = "".join(f"STAND_IN_KERNEL({name});\n" for name in names)
    source.write_text(
        f'{(KERNELS / "common.cuh").read_text()}\n#line 1 "{file}"\n{text}\n{registered}{LAUNCH}'
    )
    built = source.with_suffix(".so")
    command = ["g++", "-std=c++17", "-O1", "-ffp-contract=off", "-w", "-shared", "-fPIC", f"-DREAL={REALS[real]}"]
    # Kernels for f32 and bf16 have the same names: each library keeps its own list of them.
    command += ["-fno-gnu-unique", "-I", HERE / "include", "-include", HERE / "stand_in.h", "-o", built, source]
    subprocess.run(command, check=True)
    return ctypes.CDLL(built)


class Kernels:
    """The kernels of a file for one type of activations."""

    def __init__(self, file, real):
        self.library = library(file, real)

    def run(self, name, grid, threads, *arguments):
        """Launches a kernel. Tensors are written in place; `int` is CUDA's `int`, `float` its `float`; None is null."""
        tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        before = [tensor.clone() for tensor in tensors]
        self.launch(name, grid, threads, arguments)
        forwards = [tensor.clone() for tensor in tensors]
        for tensor, value in zip(tensors, before):
            tensor.copy_(value)
        os.environ["STAND_IN_REVERSE"] = "1"
        self.launch(name, grid, threads, arguments)
        del os.environ["STAND_IN_REVERSE"]
        for tensor, value in zip(tensors, forwards):
            assert bits(tensor) == bits(value), f"{name} depends on the order of threads"

    def launch(self, name, grid, threads, arguments):
        values = [parameter(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(
            *(ctypes.cast(ctypes.pointer(value), ctypes.c_void_p) for value in values)
        )
        sizes = [size if isinstance(size, tuple) else (size, 1) for size in (grid, threads)]
        self.library.stand_in_run(name.encode(), *sizes[0], *sizes[1], pointers, len(values))


def parameter(argument):
    if argument is None:
        return ctypes.c_void_p(0)
    if isinstance(argument, torch.Tensor):
        assert argument.is_contiguous()
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, int):
        return ctypes.c_int(argument)
    return ctypes.c_float(argument) if isinstance(argument, float) else argument


def bits(tensor):
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def random(seed, *shape, real=torch.float32, scale=1.0):
    """Values of a normal distribution, which begin at a multiple of 16 bytes."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(real)


def shifted(tensor):
    """The same values in memory that does not begin at a multiple of 16 bytes."""
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    copy = room[1:].view(tensor.shape)
    copy.copy_(tensor)
    return copy


def close(what, found, exact, tolerance):
    """Compares with values in f64: `tolerance` of the largest, and one rounding of what is found.

    A largest value below 1e-6 is itself a rounding error of what is zero in theory.
    """
    exact = exact.detach().double()
    rounding = torch.finfo(found.dtype).eps / 2 * exact.abs()
    finite = exact[exact.isfinite()]
    scale = max(finite.abs().max().item(), 1e-6) if finite.numel() else 1.0
    error = (found.double() - exact).abs()
    same = (found.double() == exact) | (found.isnan() & exact.isnan())
    good = same | (error <= rounding * 1.001 + tolerance * scale)
    assert good.all(), f"{what}: off by {error[~good].max()} of {scale}"


def gradients(function, arguments, dy):
    """Value and gradients in f64."""
    arguments = [argument.double().requires_grad_() for argument in arguments]
    y = function(*arguments)
    return y, torch.autograd.grad(y, arguments, dy.double())


def add_partials(partial):
    columns = partial.shape[1]
    sums = torch.full((columns,), torch.nan)
    sums_of = Kernels("sums.cu", torch.float32)
    sums_of.run("add_partials", -(-columns // 256), 256, partial, sums, partial.shape[0], columns)
    return sums


def norm_threads(features):
    return min(max(-(-features // 16 // 32) * 32, 32), 512)


def check_rms_norm(real):
    def function(x, weight):
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 0.1) * weight

    norm_cases(real, "rms_norm", lambda x, weight, bias: function(x, weight), biases=(False,))


def check_layer_norm(real):
    def function(x, weight, bias):
        return functional.layer_norm(x, weight.shape, weight, bias, 0.1)

    norm_cases(real, "layer_norm", function, biases=(False, True))


def norm_cases(real, name, function, biases):
    kernels = Kernels("norm.cu", real)
    rows = 5
    for features in FEATURES:
        fitting = norm_threads(features)
        # Several rows in a block only where a warp is enough for each.
        for deep, threads in {(1, 256), (1, fitting)} | ({(2, 32), (8, 32)} if fitting == 32 else set()):
            grid, block = -(-rows // deep), (threads, deep)
            for place in (lambda tensor: tensor, shifted):
                for has_bias in biases:
                    x, dy = (place(random(seed, rows, features, real=real)) for seed in (1, 2))
                    if name == "layer_norm":
                        x += 30.0
                    weight, bias = random(3, features), random(4, features)
                    y, dx = torch.empty_like(x), torch.empty_like(x)
                    before = place(random(5, rows, features, real=real))
                    what = f"{name} of {features} by {threads} x {deep}"
                    exact, (exact_dx, exact_dw, _) = gradients(
                        lambda x, w, b: function(x, w, b) + (0 * b if not has_bias else 0),
                        (x, weight, bias if has_bias else 0 * bias),
                        dy,
                    )
                    optional = () if name == "rms_norm" else (bias if has_bias else None,)
                    kernels.run(name, grid, block, x, weight, *optional, y, rows, features, 0.1)
                    close(what, y, exact, 2e-6)
                    gradient = f"{name}_input_gradient"
                    kernels.run(gradient, grid, block, x, weight, dy, dx, rows, features, 0.1, 0)
                    close(what + ", dx", dx, exact_dx, 2e-6)
                    dx.copy_(before)
                    kernels.run(gradient, grid, block, x, weight, dy, dx, rows, features, 0.1, 1)
                    close(what + ", dx added", dx, before.double() + exact_dx, 2e-6)
                    # in the memory of dy
                    same = place(dy.clone())
                    kernels.run(gradient, grid, block, x, weight, same, same, rows, features, 0.1, 0)
                    close(what + ", dx in place", same, exact_dx, 2e-6)
                    if deep > 1:
                        continue
                    partial = torch.full((3, features), torch.nan)
                    kernels.run(f"{name}_weight_gradient", 3, threads, x, dy, partial, rows, features, 0.1, 2)
                    close(what + ", dw", add_partials(partial), exact_dw, 2e-6)
    x = random(1, 3, 65, real=real)
    x[1, 64] = torch.nan
    y = torch.empty_like(x)
    kernels.run(name, 3, 256, x, random(2, 65), *(() if name == "rms_norm" else (None,)), y, 3, 65, 0.1)
    assert y[1].isnan().all() and not y[[0, 2]].isnan().any(), f"{name} of NaN"


def check_sums(real):
    kernels = Kernels("sums.cu", real)
    for rows, columns in ((1, 1), (3, 7), (131, 65), (70, 576), (33, 1009), (300, 4096)):
        for place in (lambda tensor: tensor, shifted):
            x = place(random(1, rows, columns, real=real))
            parts = -(-rows // 64)
            partial = torch.full((parts, columns), torch.nan)
            kernels.run("column_sums", (-(-columns // 256), parts), 256, x, partial, rows, columns, 64)
            close(f"column sums of {rows} x {columns}", add_partials(partial), x.double().sum(0), 1e-6)
    gradient = random(1, 10_003)
    chunks = [gradient[0:4096], gradient[4096:8192], gradient[8192:8193], shifted(gradient[8193:])]
    partial, total = torch.zeros(len(chunks), dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    table = torch.tensor([[0, chunk.data_ptr(), 0, 0, chunk.numel(), 0] for chunk in chunks])
    kernels.run("squared_norms", len(chunks), 256, table, partial)
    kernels.run("add_doubles", 1, 256, partial, len(chunks), total)
    assert abs(total.item() / gradient.double().square().sum().item() - 1) < 1e-14
    many = torch.rand(1009, dtype=torch.float64)
    kernels.run("add_doubles", 1, 256, many, 1009, total)
    assert abs(total.item() / many.sum().item() - 1) < 1e-14


def long(value):
    return ctypes.c_longlong(value)


def check_elementwise(real):
    kernels = Kernels("elementwise.cu", real)
    for n in FEATURES:
        for place in (lambda tensor: tensor, shifted):
            x, y = (place(random(seed, n, real=real)) for seed in (1, 2))
            wide, wide_y = (place(random(seed, n)) for seed in (3, 4))
            before = y.double()
            kernels.run("add_onto", 3, 256, y, x, long(n))
            close("add_onto", y, before + x.double(), 0)
            before = wide_y.double()
            kernels.run("add_onto_float", 3, 256, wide_y, wide, long(n))
            close("add_onto_float", wide_y, before + wide.double(), 0)
            kernels.run("narrow_floats", 3, 256, wide, y, long(n))
            assert bits(y) == bits(wide.to(real)), "narrow_floats"
            kernels.run("widen_reals", 3, 256, x, wide_y, long(n))
            assert bits(wide_y) == bits(x.float()), "widen_reals"
            for blocks in (1, 3, 40):
                y, bias = place(random(1, 7, n, real=real)), random(2, n)
                exact = y.double() + bias.double()
                kernels.run("add_bias", blocks, 256, y, bias, 7, n)
                close(f"add_bias of {n}", y, exact, 0)
            table, out = place(random(1, 11, n, real=real)), place(torch.empty(4, n, dtype=real))
            ids = torch.tensor([10, 0, 3, 3], dtype=torch.int32)
            kernels.run("gather", 4, 256, table, ids, out, 4, n)
            assert bits(out) == bits(table[ids]), "gather"
            spread, ids = place(torch.zeros(11, n, dtype=real)), torch.tensor([10, 0, 3, 4], dtype=torch.int32)
            kernels.run("scatter", 4, 256, out, ids, spread, 4, n)
            assert bits(spread) == bits(torch.zeros_like(table).index_copy(0, ids.long(), out)), "scatter"
            check_dropout(kernels, place(random(5, 7, n, real=real)))


def check_dropout(kernels, x):
    """As `Dropout::apply` of adapters/hooks/dropout.rs."""
    rows, columns = x.shape
    word = np.uint64
    stream, threshold, first_row = 0x1234_5678_9ABC_DEF0, int(0.3 * (2**64 - 1)), 5_000_000_003
    kept = float(np.float32(1.0 / (1.0 - 0.3)))
    with np.errstate(over="ignore"):
        value = word(stream) ^ (word(first_row) * word(columns) + np.arange(rows * columns, dtype=word))
        value += word(0x9E37_79B9_7F4A_7C15)
        value = (value ^ (value >> word(30))) * word(0xBF58_476D_1CE4_E5B9)
        value = (value ^ (value >> word(27))) * word(0x94D0_49BB_1331_11EB)
        value ^= value >> word(31)
    drops = torch.from_numpy(value < word(threshold)).view(x.shape)
    exact = torch.where(drops, torch.tensor(0.0), x.float() * kept).to(x.dtype)
    y = torch.empty_like(x)
    words = [ctypes.c_ulonglong(number) for number in (stream, threshold)]
    arguments = (rows, columns, *words, kept, ctypes.c_ulonglong(first_row))
    kernels.run("dropout", 3, 256, x, y, *arguments)
    assert bits(y) == bits(exact), "dropout"
    sums = shifted(x.flip(0)) if x.data_ptr() % 16 else x.flip(0)
    exact = (sums.float() + torch.where(drops, torch.tensor(0.0), x.float() * kept)).to(x.dtype)
    kernels.run("add_dropped", 3, 256, sums, x, *arguments)
    assert bits(sums) == bits(exact), "add_dropped"


def check_cross_entropy(real):
    kernels = Kernels("cross_entropy.cu", real)
    for classes, threads in ((1, 256), (3, 256), (1009, 256), (1000, 64), (49_152, 256), (49_152, 1024)):
        rows = 3
        logits = random(1, rows, classes, scale=5.0)
        targets = torch.tensor([row * 7919 % classes for row in range(rows)], dtype=torch.int32)
        wanted = logits.double().requires_grad_()
        exact = functional.cross_entropy(wanted, targets.long(), reduction="none")
        (exact_gradient,) = torch.autograd.grad(0.25 * exact.sum(), wanted)
        losses, gradient = torch.empty(rows, dtype=torch.float64), torch.empty(rows, classes, dtype=real)
        what = f"cross-entropy of {classes} by {threads}"
        run = lambda logits, gradient: kernels.run(
            "cross_entropy", rows, threads, logits, targets, losses, gradient, classes, 0.25
        )
        run(logits, gradient)
        assert ((losses - exact).abs() <= 2e-6 * exact.abs().clamp(min=0.1)).all(), what
        close(what + ", gradient", gradient, exact_gradient, 1e-6)
        losses.zero_()
        run(logits, None)
        assert ((losses - exact).abs() <= 2e-6 * exact.abs().clamp(min=0.1)).all(), what
        probability, best = torch.empty(rows), torch.empty(rows, dtype=torch.int32)
        kernels.run("score", rows, threads, logits, targets, probability, best, classes)
        close("score", probability, -exact, 1e-6)
        assert (best.long() == logits.argmax(-1)).all(), "score's best"
        if real == torch.float32:
            same = logits.clone()
            run(same, same)
            assert bits(same) == bits(gradient), what + ", in place"
    infinite, nan = torch.inf, torch.nan
    logits = torch.tensor([[1e30, -1e30, -infinite], [1.0, nan, 3.0], [1.0, 3.0, 3.0], [-infinite, 2.0, 2.0]])
    for classes in (3, 1000):
        wide = torch.full((4, classes), -infinite)
        wide[:, :3] = logits
        for target, expected in ((0, [0.0, nan, 2.8200, infinite]), (2, [infinite, nan, 0.75832, 0.693147])):
            targets = torch.full((4,), target, dtype=torch.int32)
            losses, gradient = torch.empty(4, dtype=torch.float64), torch.empty(4, classes, dtype=real)
            kernels.run("cross_entropy", 4, 256, wide, targets, losses, gradient, classes, 1.0)
            expected = torch.tensor(expected, dtype=torch.float64)
            expected[2] = functional.cross_entropy(logits[2].double(), torch.tensor(target))
            close("extreme losses", losses, expected, 1e-6)
            assert gradient[1].isnan().all() and not gradient[[0, 2, 3]].isnan().any()
        probability, best = torch.empty(4), torch.empty(4, dtype=torch.int32)
        kernels.run("score", 4, 256, wide, targets, probability, best, classes)
        assert best.tolist() == [0, 2, 1, 1], f"the first of equals: {best}"


def double(value):
    return ctypes.c_double(value)


TAKE, LEAVE_OUT, END_RUN = range(3)


def verdict_over(loss, norm=1.0, tokens=7, longest=0.0, highest=float("inf"), spike=LEAVE_OUT):
    """As `StepLimits::judge` of verdict.rs. `loss` and `norm` are those of the sums over the step's passes."""
    loss, norm = np.float64(loss) / tokens, np.sqrt(np.float64(norm) * norm) / tokens
    clip = longest / (norm + 1e-6) if longest > 0 else 1.0
    clip = clip if clip < 1 else 1.0
    fault = 1 if not (np.isfinite(loss) and np.isfinite(norm)) else 2 if loss > highest else 0
    return [loss, norm, np.float64(np.float32(clip / tokens)), fault, (TAKE, END_RUN, spike)[fault]]


def check_verdict(real):
    kernels = Kernels("adamw.cu", real)
    for losses, limits in (
        ((3.5,), {}),
        ((0.1, 0.2, 0.3), {"norm": 11.3, "longest": 0.37, "tokens": 13}),
        ((0.1, 0.2), {"norm": 0.3, "longest": 1.0}),
        ((), {"tokens": 3, "longest": float("inf")}),
        ((9.0, 5.0), {"highest": 2.0}),
        ((9.0, 5.1), {"highest": 2.0}),
        ((9.0, 5.1), {"highest": 2.0, "spike": TAKE}),
        ((float("nan"), 1.0), {"highest": 2.0}),
        ((float("inf"),), {}),
        ((1.0,), {"norm": float("inf"), "longest": 1.0}),
        ((1.0,), {"norm": float("nan"), "longest": 1.0}),
    ):
        values = [torch.tensor([loss]) for loss in losses]
        wanted = verdict_over(sum(value.double().item() for value in values), **limits)
        squares = torch.tensor([limits.get("norm", 1.0)], dtype=torch.float64).square()
        found = torch.full((5,), torch.nan, dtype=torch.float64)
        kernels.run(
            "judge",
            1,
            32,
            torch.tensor([value.data_ptr() for value in values]),
            len(values),
            squares,
            *(double(number) for number in (limits.get("tokens", 7), limits.get("longest", 0.0))),
            double(limits.get("highest", float("inf"))),
            END_RUN,
            limits.get("spike", LEAVE_OUT),
            found,
        )
        assert np.array_equal(found.numpy(), np.array(wanted), equal_nan=True), f"{losses}, {limits}: {found}"


def check_adamw(real):
    """As `update` of adamw.rs: torch's own kernels round otherwise."""
    libm = ctypes.CDLL("libm.so.6")
    libm.fmaf.restype, libm.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    fma = np.vectorize(libm.fmaf, otypes=[np.float32])
    f32 = np.float32
    kernels = Kernels("adamw.cu", real)
    for beta1_rest in (0.1, 0.7):
        keep, rate, rest1, beta2, rest2 = map(f32, (0.999, -0.013, beta1_rest, 0.99, 0.01))
        correction, epsilon, scale = f32(0.1), f32(1e-8), f32(0.37)
        tensors = [random(seed, 5003) for seed in range(4)]
        tensors[3] = tensors[3].square()
        before = [bits(tensor) for tensor in tensors]
        w, given, m, v = (tensor.numpy().copy() for tensor in tensors)
        g = given * scale
        m = fma(rest1, g - m, m) if abs(rest1) < 0.5 else fma(rest1 - f32(1), g - m, g)
        v = v * beta2 + rest2 * g * g
        w = w * keep + rate * m / (np.sqrt(v) / correction + epsilon)
        # a chunk of whole packs, one that begins between them and one with a rest
        cuts, rows = (0, 1024, 2049, 5003), []
        for start, end in zip(cuts, cuts[1:]):
            rows.append([tensor[start:end].data_ptr() for tensor in tensors] + [end - start, 0])
        table = torch.tensor(rows)
        numbers = [float(number) for number in (keep, rate, rest1, beta2, rest2, correction, epsilon)]
        for reaction in (LEAVE_OUT, END_RUN, TAKE):
            verdict = torch.tensor([1, 1, float(scale), 0, reaction], dtype=torch.float64)
            kernels.launch("adamw", len(rows), 256, (table, 2954, verdict, *numbers))
            if reaction != TAKE:
                assert [bits(tensor) for tensor in tensors] == before, "adamw moved weights all the same"
        for what, tensor, exact in zip("wgmv", tensors, (w, given, m, v)):
            assert bits(tensor) == exact.tobytes(), f"adamw's {what}"


def check_rope(real):
    kernels = Kernels("rope.cu", real)
    for rows, heads, head_dim in ((1, 1, 2), (3, 3, 64), (19, 3, 22), (9, 9, 64), (5, 2, 128), (2, 1, 256)):
        for place in (lambda tensor: tensor, shifted):
            x = place(random(1, rows, heads * head_dim, real=real))
            angles = random(2, rows, head_dim // 2)
            cos, sin = angles.cos(), angles.sin()
            for backward in (0, 1):
                low, high = x.double().view(rows, heads, 2, head_dim // 2).unbind(2)
                c, s = cos.double()[:, None], sin.double()[:, None] * (-1 if backward else 1)
                exact = torch.stack((low * c - high * s, high * c + low * s), 2).view(x.shape)
                y = torch.empty_like(x)
                kernels.run("rope", 2, 256, x, cos, sin, y, rows, heads, head_dim, backward)
                close(f"rope of {head_dim}", y, exact, 1e-6)
                same = x.clone()
                kernels.run("rope", 2, 256, same, cos, sin, same, rows, heads, head_dim, backward)
                assert bits(same) == bits(y), "rope in place"


def check_gated_activation(real):
    kernels = Kernels("gated_activation.cu", real)
    activations = (
        functional.silu,
        lambda x: functional.gelu(x, approximate="tanh"),
        functional.gelu,
    )
    for n in FEATURES:
        for place in (lambda tensor: tensor, shifted):
            gate, up, dy = (place(random(seed, n, real=real)) for seed in (1, 2, 3))
            gate *= 4.0
            for kind, activation in enumerate(activations):
                exact, exact_gradients = gradients(lambda gate, up: activation(gate) * up, (gate, up), dy)
                y, dgate, dup = (torch.empty_like(gate) for _ in range(3))
                kernels.run("gated_activation", 3, 256, gate, up, y, long(n), kind)
                close(f"activation {kind}", y, exact, 1e-6)
                kernels.run("gated_activation_gradients", 3, 256, gate, up, dy, dgate, dup, long(n), kind)
                # `1 - s` of the CPU's formula too loses digits where the gate is large.
                for found, wanted in zip((dgate, dup), exact_gradients):
                    close(f"gradient of activation {kind}", found, wanted, 4e-6)
                same_gate, same_up = place(gate.clone()), place(up.clone())
                kernels.run(
                    "gated_activation_gradients", 3, 256, same_gate, same_up, dy, same_gate, same_up, long(n), kind
                )
                assert bits(same_gate) == bits(dgate) and bits(same_up) == bits(dup), "in place"
    gate = torch.tensor([-1e10, -200.0, 200.0, torch.nan]).to(real)
    one, y = torch.ones(4, dtype=real), torch.empty(4, dtype=real)
    for kind in range(3):
        kernels.run("gated_activation", 1, 32, gate, one, y, long(4), kind)
        assert y[:3].tolist() == [0.0, 0.0, 200.0] and y[3].isnan(), f"ends of activation {kind}"
        dgate, dup = torch.empty(4, dtype=real), torch.empty(4, dtype=real)
        kernels.run("gated_activation_gradients", 1, 32, gate, one, one, dgate, dup, long(4), kind)
        assert dgate[:3].tolist() == [0.0, 0.0, 1.0] and dgate[3].isnan(), f"slopes of activation {kind}"


def check_nf4(real):
    kernels = Kernels("nf4.cu", real)
    # The levels of the CPU's code.
    listed = (KERNELS.parent / "nf4.rs").read_text().split("LEVELS: [f32; 16] = [")[1].split("]")[0]
    levels = torch.tensor([float(level.replace("_", "")) for level in listed.split(",") if level.strip()])
    for n in (1, 7, 8, 64, 65, 350, 70_001):
        blocks = (n + 63) // 64
        codes = torch.randint(16, (blocks * 64,), generator=torch.Generator().manual_seed(n))
        words = (codes.view(-1, 8) << torch.arange(0, 32, 4)).sum(1)
        words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
        largest = random(2, blocks).abs()
        values = torch.empty(n, dtype=real)
        kernels.run("widen_nf4", 3, 256, words, largest, values, long(n))
        exact = (levels[codes] * largest.repeat_interleave(64))[:n].to(real)
        assert bits(values) == bits(exact), f"{n} values in NF4"


PARTS = (
    check_rms_norm,
    check_layer_norm,
    check_sums,
    check_elementwise,
    check_cross_entropy,
    check_verdict,
    check_adamw,
    check_rope,
    check_gated_activation,
    check_nf4,
)


def main():
    torch.set_num_threads(1)
    chosen = sys.argv[1:]
    for part in PARTS:
        name = part.__name__.removeprefix("check_")
        if chosen and name not in chosen:
            continue
        for real in REALS:
            part(real)
            print(f"{name} with {str(real).removeprefix('torch.')}: equal")


if __name__ == "__main__":
    main()
