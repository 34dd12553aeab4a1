// What is done value by value.
//
// Launch: blocks of 256 threads, as many as there are packs of `WIDE` values for them or fewer, for each thread goes on
// until all is done (`gather` has a grid of its own). No dynamic shared memory. A result may lie where an argument of
// the same type lies, at the same place.

struct AddOnto {
    template <int WIDTH> static __device__ __forceinline__ void at(long long at, real* y, const real* x) {
        Pack<real, WIDTH> sums = load<WIDTH>(y + at);
        const Pack<real, WIDTH> values = load<WIDTH>(x + at);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) sums.values[i] = narrow<real>(widen(sums.values[i]) + widen(values.values[i]));
        store(y + at, sums);
    }
};

// y += x
extern "C" __global__ void __launch_bounds__(256) add_onto(real* y, const real* x, long long n) {
    over_grid<AddOnto, WIDE>(n, aligned(x, y), y, x);
}

struct AddOntoFloat {
    template <int WIDTH> static __device__ __forceinline__ void at(long long at, float* y, const float* x) {
        Pack<float, WIDTH> sums = load<WIDTH>(y + at);
        const Pack<float, WIDTH> values = load<WIDTH>(x + at);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) sums.values[i] += values.values[i];
        store(y + at, sums);
    }
};

// y += x
extern "C" __global__ void __launch_bounds__(256) add_onto_float(float* y, const float* x, long long n) {
    over_grid<AddOntoFloat, 4>(n, aligned(x, y), y, x);
}

template <int WIDTH>
__device__ __forceinline__ void add_bias_packs(real* y, const float* __restrict__ bias, int rows, int columns) {
    const long long packs = static_cast<long long>(rows) * columns / WIDTH;
    const long long threads = static_cast<long long>(gridDim.x) * blockDim.x;
    const long long first = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    // Columns are followed by addition: a division for each pack would take longer than the pack.
    const int step = threads * WIDTH % columns;
    int column = first * WIDTH % columns;
    for (long long pack = first; pack < packs; pack += threads) {
        Pack<real, WIDTH> sums = load<WIDTH>(y + pack * WIDTH);
        const Pack<float, WIDTH> values = load<WIDTH>(bias + column);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) sums.values[i] = narrow<real>(widen(sums.values[i]) + values.values[i]);
        store(y + pack * WIDTH, sums);
        column = column < columns - step ? column + step : column - (columns - step);
    }
}

// y += bias, in every row of `y`, (rows, columns).
extern "C" __global__ void __launch_bounds__(256) add_bias(real* y, const float* bias, int rows, int columns) {
    if (columns % WIDE == 0 && aligned(y, bias)) {
        add_bias_packs<WIDE>(y, bias, rows, columns);
    } else {
        add_bias_packs<1>(y, bias, rows, columns);
    }
}

// Row `i` of `out`, (count, columns), is row `ids[i]` of `table`. Grid: `count`.
extern "C" __global__ void __launch_bounds__(256)
gather(const real* table, const unsigned* ids, real* out, int count, int columns) {
    const real* from = table + static_cast<long long>(ids[blockIdx.x]) * columns;
    real* to = out + static_cast<long long>(blockIdx.x) * columns;
    if (columns % WIDE == 0 && aligned(table, out)) {
        for (int at = threadIdx.x * WIDE; at < columns; at += blockDim.x * WIDE) store(to + at, load<WIDE>(from + at));
    } else {
        for (int at = threadIdx.x; at < columns; at += blockDim.x) to[at] = from[at];
    }
}

struct NarrowFloats {
    template <int WIDTH> static __device__ __forceinline__ void at(long long at, const float* x, real* y) {
        const Pack<float, WIDTH> wide = load<WIDTH>(x + at);
        Pack<real, WIDTH> narrowed;
#pragma unroll
        for (int i = 0; i < WIDTH; i++) narrowed.values[i] = narrow<real>(wide.values[i]);
        store(y + at, narrowed);
    }
};

extern "C" __global__ void __launch_bounds__(256) narrow_floats(const float* x, real* y, long long n) {
    over_grid<NarrowFloats, WIDE>(n, aligned(x, y), x, y);
}

struct WidenReals {
    template <int WIDTH> static __device__ __forceinline__ void at(long long at, const real* x, float* y) {
        const Pack<real, WIDTH> narrowed = load<WIDTH>(x + at);
        Pack<float, WIDTH> wide;
#pragma unroll
        for (int i = 0; i < WIDTH; i++) wide.values[i] = widen(narrowed.values[i]);
        store(y + at, wide);
    }
};

extern "C" __global__ void __launch_bounds__(256) widen_reals(const real* x, float* y, long long n) {
    over_grid<WidenReals, WIDE>(n, aligned(x, y), x, y);
}

struct ScaleFloats {
    template <int WIDTH> static __device__ __forceinline__ void at(long long at, float* x, float factor) {
        Pack<float, WIDTH> values = load<WIDTH>(x + at);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) values.values[i] *= factor;
        store(x + at, values);
    }
};

// x *= factor
extern "C" __global__ void __launch_bounds__(256) scale_floats(float* x, float factor, long long n) {
    over_grid<ScaleFloats, 4>(n, aligned(x), x, factor);
}

// The finaliser of SplitMix64.
__device__ __forceinline__ unsigned long long mix(unsigned long long value) {
    value += 0x9E3779B97F4A7C15ull;
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9ull;
    value = (value ^ value >> 27) * 0x94D049BB133111EBull;
    return value ^ value >> 31;
}

struct Dropout {
    template <int WIDTH> static __device__ __forceinline__ void at(
        long long at, const real* x, real* y, unsigned long long stream, unsigned long long threshold, float kept,
        unsigned long long first
    ) {
        Pack<real, WIDTH> values = load<WIDTH>(x + at);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            const bool drops = mix(stream ^ (first + at + i)) < threshold;
            values.values[i] = narrow<real>(drops ? 0.0f : widen(values.values[i]) * kept);
        }
        store(y + at, values);
    }
};

// Zero where `Dropout::apply` drops, else x · kept: the same mask to the bit. `x` and `y` are (rows, columns); the last
// four arguments are the fields of `Dropout`, in their order.
extern "C" __global__ void __launch_bounds__(256) dropout(
    const real* x, real* y, int rows, int columns, unsigned long long stream, unsigned long long threshold, float kept,
    unsigned long long first_row
) {
    const unsigned long long first = first_row * columns;
    const long long n = static_cast<long long>(rows) * columns;
    over_grid<Dropout, WIDE>(n, aligned(x, y), x, y, stream, threshold, kept, first);
}
