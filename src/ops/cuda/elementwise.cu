// What is done value by value.
//
// Launch: blocks of 256 threads, as many as there are packs of `WIDE` values for them or fewer, for each thread goes on
// until all is done (`gather`, `scatter` and `add_segments` have grids of their own). No dynamic shared memory. A result may lie where an argument of
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

// Row `to_row` of `out` becomes row `from_row` of `table`, both of `columns`.
__device__ __forceinline__ void copy_row(
    const real* table, long long from_row, real* out, long long to_row, int columns
) {
    const real* from = table + from_row * columns;
    real* to = out + to_row * columns;
    if (columns % WIDE == 0 && aligned(table, out)) {
        for (int at = threadIdx.x * WIDE; at < columns; at += blockDim.x * WIDE) store(to + at, load<WIDE>(from + at));
    } else {
        for (int at = threadIdx.x; at < columns; at += blockDim.x) to[at] = from[at];
    }
}

// Row `i` of `out`, (count, columns), is row `ids[i]` of `table`. Grid: `count`.
extern "C" __global__ void __launch_bounds__(256)
gather(const real* table, const unsigned* ids, real* out, int count, int columns) {
    copy_row(table, ids[blockIdx.x], out, blockIdx.x, columns);
}

// Row `ids[i]` of `out` becomes row `i` of `rows`, (count, columns); no two of `ids` are the same. Grid: `count`.
extern "C" __global__ void __launch_bounds__(256)
scatter(const real* rows, const unsigned* ids, real* out, int count, int columns) {
    copy_row(rows, blockIdx.x, out, ids[blockIdx.x], columns);
}

// Row `i` of the gradients of `count` rows of `out`, of `columns`: `ends` holds a pair of words for each, its number and where
// in `places` the rows of `gradients` end that are added up, and before the first a pair whose end is 0. Grid: `count` x columns.
extern "C" __global__ void __launch_bounds__(256)
add_segments(const float* gradients, const unsigned* places, const unsigned* ends, float* out, int columns) {
    const int column = blockIdx.y * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    const unsigned* pair = ends + 2 * (long long)blockIdx.x;
    float sum = 0;
    for (unsigned at = pair[1]; at < pair[3]; at++) sum += gradients[(long long)places[at] * columns + column];
    out[(long long)pair[2] * columns + column] = sum;
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

// The finaliser of SplitMix64.
__device__ __forceinline__ unsigned long long mix(unsigned long long value) {
    value += 0x9E3779B97F4A7C15ull;
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9ull;
    value = (value ^ value >> 27) * 0x94D049BB133111EBull;
    return value ^ value >> 31;
}

// Which values of a pass are dropped, and the factor of the others; `first` is the number in the step of the first value.
struct Mask {
    unsigned long long stream, threshold;
    float kept;
    unsigned long long first;

    __device__ __forceinline__ float operator()(long long at, float value) const {
        return mix(stream ^ (first + at)) < threshold ? 0.0f : value * kept;
    }
};

struct Dropout {
    template <int WIDTH>
    static __device__ __forceinline__ void at(long long at, const real* x, real* y, Mask mask) {
        Pack<real, WIDTH> values = load<WIDTH>(x + at);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) values.values[i] = narrow<real>(mask(at + i, widen(values.values[i])));
        store(y + at, values);
    }
};

// Zero where `Dropout::apply` drops, else x · kept: the same mask to the bit. `x` and `y` are (rows, columns); the last
// four arguments are the fields of `Dropout`, in their order.
extern "C" __global__ void __launch_bounds__(256) dropout(
    const real* x, real* y, int rows, int columns, unsigned long long stream, unsigned long long threshold, float kept,
    unsigned long long first_row
) {
    const Mask mask = {stream, threshold, kept, first_row * columns};
    over_grid<Dropout, WIDE>(static_cast<long long>(rows) * columns, aligned(x, y), x, y, mask);
}

struct AddDropped {
    template <int WIDTH>
    static __device__ __forceinline__ void at(long long at, real* y, const real* x, Mask mask) {
        Pack<real, WIDTH> sums = load<WIDTH>(y + at);
        const Pack<real, WIDTH> values = load<WIDTH>(x + at);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            sums.values[i] = narrow<real>(widen(sums.values[i]) + mask(at + i, widen(values.values[i])));
        }
        store(y + at, sums);
    }
};

// y += dropout(x), with the arguments of `dropout`.
extern "C" __global__ void __launch_bounds__(256) add_dropped(
    real* y, const real* x, int rows, int columns, unsigned long long stream, unsigned long long threshold, float kept,
    unsigned long long first_row
) {
    const Mask mask = {stream, threshold, kept, first_row * columns};
    over_grid<AddDropped, WIDE>(static_cast<long long>(rows) * columns, aligned(x, y), y, x, mask);
}
