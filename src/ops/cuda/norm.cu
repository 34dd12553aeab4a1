// Root-mean-square and layer normalisation of the rows of a matrix, and their gradients.
//
// The formulas are those of `rms_norm.rs` and `layer_norm.rs`. `weight` and `bias` are (features).
//
// Launch of all six: 32 to 512 threads for a row, at best `features / 16` rounded up to a multiple of 32; any number
// serves every size. They are the first direction of a block. Where they are a single warp, the four kernels that take
// `rows` also take several rows in a block, its second direction: a block of one warp takes as long to start as one of
// eight, and no more than 32 are on a multiprocessor. The grid is said at each kernel. No dynamic shared memory.
//
// A row is read once: a thread keeps 16 of its values in registers and reads again what is beyond, or most of it where
// rows do not begin at multiples of 16 bytes. Results may lie where one of the arguments of the same type lay: a thread
// writes only where it alone has read.

// Packs of `WIDTH` values of a row that a thread keeps.
template <int WIDTH> inline constexpr int SLOTS = WIDTH == 1 ? 1 : 16 / WIDTH;

// Calls `visit(slot, at)` for each pack of `WIDTH` values of a row that is this thread's; those from slot `SLOTS` on
// are not kept.
template <int WIDTH, typename Visit> __device__ __forceinline__ void over_row(int features, Visit visit) {
    const int stride = blockDim.x * WIDTH;
    int at = threadIdx.x * WIDTH;
#pragma unroll
    for (int slot = 0; slot < SLOTS<WIDTH>; slot++, at += stride) {
        if (at < features) visit(slot, at);
    }
    for (; at < features; at += stride) visit(SLOTS<WIDTH>, at);
}

// A thread's part of a row.
template <int WIDTH> struct Row {
    const real* values;
    Pack<real, WIDTH> held[SLOTS<WIDTH>];

    __device__ __forceinline__ Row(const real* values) : values(values) {}

    // The pack `at` this place, which is kept under `slot`.
    __device__ __forceinline__ Pack<real, WIDTH> first(int slot, int at) {
        const Pack<real, WIDTH> pack = load<WIDTH>(values + at);
        if (slot < SLOTS<WIDTH>) held[slot] = pack;
        return pack;
    }

    // The same pack as `first` gave.
    __device__ __forceinline__ Pack<real, WIDTH> again(int slot, int at) const {
        return slot < SLOTS<WIDTH> ? held[slot] : load<WIDTH>(values + at);
    }
};

// `x - mean`, with the mean in two parts: rounded to one f32, it would be an error of every value of a row that lies
// far from zero.
struct Centre {
    float high, low;

    __device__ __forceinline__ Centre(double mean) : high(mean), low(mean - high) {}
    __device__ __forceinline__ float operator()(float x) const { return x - high - low; }
};

// Reads a row; returns `1 / √(mean(x²) + epsilon)`.
template <int WIDTH> __device__ __forceinline__ float read_inverse_rms(Row<WIDTH>& x, int features, float epsilon) {
    float squares = 0;
    over_row<WIDTH>(features, [&](int slot, int at) {
        const Pack<real, WIDTH> pack = x.first(slot, at);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) squares = fmaf(widen(pack.values[i]), widen(pack.values[i]), squares);
    });
    return 1.0f / sqrtf(sum_block(squares) / features + epsilon);
}

// Reads a row; returns its mean.
template <int WIDTH> __device__ __forceinline__ Centre read_centre(Row<WIDTH>& x, int features) {
    double sum = 0;
    over_row<WIDTH>(features, [&](int slot, int at) {
        const Pack<real, WIDTH> pack = x.first(slot, at);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) sum += widen(pack.values[i]);
    });
    return Centre(sum_block(sum) / features);
}

// `1 / √(variance(x) + epsilon)` of a row that has been read.
template <int WIDTH>
__device__ __forceinline__ float inverse_deviation(const Row<WIDTH>& x, Centre centre, int features, float epsilon) {
    float squares = 0;
    over_row<WIDTH>(features, [&](int slot, int at) {
        const Pack<real, WIDTH> pack = x.again(slot, at);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            const float centred = centre(widen(pack.values[i]));
            squares = fmaf(centred, centred, squares);
        }
    });
    return 1.0f / sqrtf(sum_block(squares) / features + epsilon);
}

// Whether the rows of matrices that begin at these places can be read in packs of `WIDE`.
template <typename... Pointers> __device__ __forceinline__ bool wide_rows(int features, const Pointers*... matrices) {
    return features % WIDE == 0 && aligned(matrices...);
}

// The row of a thread in the kernels that have a row for each thread.
__device__ __forceinline__ int own_row() { return blockIdx.x * blockDim.y + threadIdx.y; }

// --- root mean square ---

template <int WIDTH>
__device__ __forceinline__ void rms_norm_row(
    const real* from, const float* __restrict__ weight, real* to, int features, float epsilon
) {
    Row<WIDTH> x(from);
    const float r = read_inverse_rms(x, features, epsilon);
    over_row<WIDTH>(features, [&](int slot, int at) {
        Pack<real, WIDTH> pack = x.again(slot, at);
        const Pack<float, WIDTH> w = load<WIDTH>(weight + at);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) pack.values[i] = narrow<real>(widen(pack.values[i]) * r * w.values[i]);
        store(to + at, pack);
    });
}

// Grid: ceil(rows / blockDim.y).
extern "C" __global__ void __launch_bounds__(512, 2)
rms_norm(const real* x, const float* weight, real* y, int rows, int features, float epsilon) {
    if (own_row() >= rows) return;
    const long long row = static_cast<long long>(own_row()) * features;
    if (wide_rows(features, x, weight, y)) {
        rms_norm_row<WIDE>(x + row, weight, y + row, features, epsilon);
    } else {
        rms_norm_row<1>(x + row, weight, y + row, features, epsilon);
    }
}

template <int WIDTH>
__device__ __forceinline__ void rms_norm_input_gradient_row(
    const real* from, const float* __restrict__ weight, const real* gradient, real* to, int features, float epsilon,
    int add
) {
    Row<WIDTH> x(from), dy(gradient);
    const float r = read_inverse_rms(x, features, epsilon);
    float product = 0;
    over_row<WIDTH>(features, [&](int slot, int at) {
        const Pack<real, WIDTH> values = x.again(slot, at), slopes = dy.first(slot, at);
        const Pack<float, WIDTH> w = load<WIDTH>(weight + at);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            product = fmaf(widen(slopes.values[i]) * w.values[i], widen(values.values[i]), product);
        }
    });
    const float along = sum_block(product) * r * r * r / features;
    over_row<WIDTH>(features, [&](int slot, int at) {
        const Pack<real, WIDTH> values = x.again(slot, at), slopes = dy.again(slot, at);
        const Pack<float, WIDTH> w = load<WIDTH>(weight + at);
        Pack<real, WIDTH> dx;
        if (add) dx = load<WIDTH>(to + at);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            const float scaled = widen(slopes.values[i]) * w.values[i];
            const float slope = scaled * r - widen(values.values[i]) * along;
            dx.values[i] = narrow<real>(add ? widen(dx.values[i]) + slope : slope);
        }
        store(to + at, dx);
    });
}

// Grid: ceil(rows / blockDim.y). Adds to `dx` if `add`, else overwrites it.
extern "C" __global__ void __launch_bounds__(512, 2) rms_norm_input_gradient(
    const real* x, const float* weight, const real* dy, real* dx, int rows, int features, float epsilon, int add
) {
    if (own_row() >= rows) return;
    const long long row = static_cast<long long>(own_row()) * features;
    if (wide_rows(features, x, weight, dy, dx)) {
        rms_norm_input_gradient_row<WIDE>(x + row, weight, dy + row, dx + row, features, epsilon, add);
    } else {
        rms_norm_input_gradient_row<1>(x + row, weight, dy + row, dx + row, features, epsilon, add);
    }
}

// A thread's part of a sum of rows: in registers as far as it is kept, else in memory from the beginning.
template <int WIDTH> struct RowSum {
    float* sums;
    Pack<float, WIDTH> held[SLOTS<WIDTH>];

    __device__ __forceinline__ RowSum(float* sums, int features) : sums(sums) {
        over_row<WIDTH>(features, [&](int slot, int at) {
#pragma unroll
            for (int i = 0; i < WIDTH; i++) (slot < SLOTS<WIDTH> ? held[slot].values[i] : sums[at + i]) = 0;
        });
    }

    __device__ __forceinline__ void add(int slot, int at, const Pack<float, WIDTH>& part) {
#pragma unroll
        for (int i = 0; i < WIDTH; i++) (slot < SLOTS<WIDTH> ? held[slot].values[i] : sums[at + i]) += part.values[i];
    }

    // Writes the part that is kept in registers.
    __device__ __forceinline__ void finish(int features) const {
        over_row<WIDTH>(features, [&](int slot, int at) {
            if (slot < SLOTS<WIDTH>) store(sums + at, held[slot]);
        });
    }
};

template <int WIDTH>
__device__ __forceinline__ void rms_norm_weight_gradient_rows(
    const real* x, const real* dy, float* partial, int first, int end, int features, float epsilon
) {
    RowSum<WIDTH> dw(partial, features);
    for (int row = first; row < end; row++) {
        const long long start = static_cast<long long>(row) * features;
        Row<WIDTH> values(x + start);
        const float r = read_inverse_rms(values, features, epsilon);
        over_row<WIDTH>(features, [&](int slot, int at) {
            const Pack<real, WIDTH> x = values.again(slot, at), slopes = load<WIDTH>(dy + start + at);
            Pack<float, WIDTH> part;
#pragma unroll
            for (int i = 0; i < WIDTH; i++) part.values[i] = widen(x.values[i]) * r * widen(slopes.values[i]);
            dw.add(slot, at, part);
        });
    }
    dw.finish(features);
}

// Grid: ceil(rows / rows_per_block). `partial` is (grid, features), one row for the sum of each block's rows:
// `add_partials` adds them up.
extern "C" __global__ void __launch_bounds__(512, 2) rms_norm_weight_gradient(
    const real* x, const real* dy, float* partial, int rows, int features, float epsilon, int rows_per_block
) {
    const int first = blockIdx.x * rows_per_block;
    const int end = min(rows, first + rows_per_block);
    float* sums = partial + static_cast<long long>(blockIdx.x) * features;
    if (wide_rows(features, x, dy, partial)) {
        rms_norm_weight_gradient_rows<WIDE>(x, dy, sums, first, end, features, epsilon);
    } else {
        rms_norm_weight_gradient_rows<1>(x, dy, sums, first, end, features, epsilon);
    }
}

// --- layer norm ---

template <int WIDTH>
__device__ __forceinline__ void layer_norm_row(
    const real* from, const float* __restrict__ weight, const float* __restrict__ bias, real* to, int features,
    float epsilon
) {
    Row<WIDTH> x(from);
    const Centre centre = read_centre(x, features);
    const float r = inverse_deviation(x, centre, features, epsilon);
    over_row<WIDTH>(features, [&](int slot, int at) {
        Pack<real, WIDTH> pack = x.again(slot, at);
        const Pack<float, WIDTH> w = load<WIDTH>(weight + at);
        Pack<float, WIDTH> b = {};
        if (bias) b = load<WIDTH>(bias + at);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            pack.values[i] = narrow<real>(centre(widen(pack.values[i])) * (r * w.values[i]) + b.values[i]);
        }
        store(to + at, pack);
    });
}

// Grid: ceil(rows / blockDim.y). `bias` may be null.
extern "C" __global__ void __launch_bounds__(512, 2)
layer_norm(const real* x, const float* weight, const float* bias, real* y, int rows, int features, float epsilon) {
    if (own_row() >= rows) return;
    const long long row = static_cast<long long>(own_row()) * features;
    if (wide_rows(features, x, weight, bias, y)) {
        layer_norm_row<WIDE>(x + row, weight, bias, y + row, features, epsilon);
    } else {
        layer_norm_row<1>(x + row, weight, bias, y + row, features, epsilon);
    }
}

template <int WIDTH>
__device__ __forceinline__ void layer_norm_input_gradient_row(
    const real* from, const float* __restrict__ weight, const real* gradient, real* to, int features, float epsilon,
    int add
) {
    Row<WIDTH> x(from), dy(gradient);
    const Centre centre = read_centre(x, features);
    const float r = inverse_deviation(x, centre, features, epsilon);
    double sum = 0;
    float product = 0;
    over_row<WIDTH>(features, [&](int slot, int at) {
        const Pack<real, WIDTH> values = x.again(slot, at), slopes = dy.first(slot, at);
        const Pack<float, WIDTH> w = load<WIDTH>(weight + at);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            const float scaled = widen(slopes.values[i]) * w.values[i];
            sum += scaled;
            product = fmaf(scaled, centre(widen(values.values[i])), product);
        }
    });
    const float level = sum_block(sum) / features;
    const float along = sum_block(product) * r * r / features;
    over_row<WIDTH>(features, [&](int slot, int at) {
        const Pack<real, WIDTH> values = x.again(slot, at), slopes = dy.again(slot, at);
        const Pack<float, WIDTH> w = load<WIDTH>(weight + at);
        Pack<real, WIDTH> dx;
        if (add) dx = load<WIDTH>(to + at);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            const float scaled = widen(slopes.values[i]) * w.values[i];
            const float slope = (scaled - level - centre(widen(values.values[i])) * along) * r;
            dx.values[i] = narrow<real>(add ? widen(dx.values[i]) + slope : slope);
        }
        store(to + at, dx);
    });
}

// Grid: ceil(rows / blockDim.y). Adds to `dx` if `add`, else overwrites it.
extern "C" __global__ void __launch_bounds__(512, 1) layer_norm_input_gradient(
    const real* x, const float* weight, const real* dy, real* dx, int rows, int features, float epsilon, int add
) {
    if (own_row() >= rows) return;
    const long long row = static_cast<long long>(own_row()) * features;
    if (wide_rows(features, x, weight, dy, dx)) {
        layer_norm_input_gradient_row<WIDE>(x + row, weight, dy + row, dx + row, features, epsilon, add);
    } else {
        layer_norm_input_gradient_row<1>(x + row, weight, dy + row, dx + row, features, epsilon, add);
    }
}

template <int WIDTH>
__device__ __forceinline__ void layer_norm_weight_gradient_rows(
    const real* x, const real* dy, float* partial, int first, int end, int features, float epsilon
) {
    RowSum<WIDTH> dw(partial, features);
    for (int row = first; row < end; row++) {
        const long long start = static_cast<long long>(row) * features;
        Row<WIDTH> values(x + start);
        const Centre centre = read_centre(values, features);
        const float r = inverse_deviation(values, centre, features, epsilon);
        over_row<WIDTH>(features, [&](int slot, int at) {
            const Pack<real, WIDTH> x = values.again(slot, at), slopes = load<WIDTH>(dy + start + at);
            Pack<float, WIDTH> part;
#pragma unroll
            for (int i = 0; i < WIDTH; i++) part.values[i] = centre(widen(x.values[i])) * r * widen(slopes.values[i]);
            dw.add(slot, at, part);
        });
    }
    dw.finish(features);
}

// As `rms_norm_weight_gradient`. The bias's gradient is a sum of columns.
extern "C" __global__ void __launch_bounds__(512, 1) layer_norm_weight_gradient(
    const real* x, const real* dy, float* partial, int rows, int features, float epsilon, int rows_per_block
) {
    const int first = blockIdx.x * rows_per_block;
    const int end = min(rows, first + rows_per_block);
    float* sums = partial + static_cast<long long>(blockIdx.x) * features;
    if (wide_rows(features, x, dy, partial)) {
        layer_norm_weight_gradient_rows<WIDE>(x, dy, sums, first, end, features, epsilon);
    } else {
        layer_norm_weight_gradient_rows<1>(x, dy, sums, first, end, features, epsilon);
    }
}
