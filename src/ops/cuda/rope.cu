// Rotary position embedding.

// Turns the pairs of a row in packs of `WIDTH`, one lane each.
template <int WIDTH>
__device__ __forceinline__ void turn_row(
    const real* x, const float* __restrict__ cos, const float* __restrict__ sin, real* y, int heads, int half,
    float direction
) {
    const int head_packs = half / WIDTH;
    for (int pack = threadIdx.x % WARP; pack < heads * head_packs; pack += WARP) {
        const int head = pack / head_packs;
        const int angle = (pack - head * head_packs) * WIDTH;
        const int low = head * 2 * half + angle;
        const int high = low + half;
        Pack<real, WIDTH> lows = load<WIDTH>(x + low), highs = load<WIDTH>(x + high);
        const Pack<float, WIDTH> c = load<WIDTH>(cos + angle), s = load<WIDTH>(sin + angle);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            const float a = widen(lows.values[i]), b = widen(highs.values[i]);
            lows.values[i] = narrow<real>(a * c.values[i] - b * (s.values[i] * direction));
            highs.values[i] = narrow<real>(b * c.values[i] + a * (s.values[i] * direction));
        }
        store(y + low, lows);
        store(y + high, highs);
    }
}

// Turns each pair (x[i], x[i + head_dim / 2]) of each head by the angle of its row, or back by it if `backward`.
//
// `x` and `y` are (rows, heads · head_dim) and may be the same memory; `cos` and `sin` are (rows, head_dim / 2). A warp
// takes a row. Grid: ceil(rows / 8) or fewer, blocks of 256 threads. No dynamic shared memory.
extern "C" __global__ void __launch_bounds__(256) rope(
    const real* x, const float* cos, const float* sin, real* y, int rows, int heads, int head_dim, int backward
) {
    const int half = head_dim / 2;
    const float direction = backward ? -1.0f : 1.0f;
    const bool wide = half % WIDE == 0 && aligned(x, cos, sin, y);
    const int warps = gridDim.x * (blockDim.x / WARP);
    for (int row = (blockIdx.x * blockDim.x + threadIdx.x) / WARP; row < rows; row += warps) {
        const long long start = static_cast<long long>(row) * heads * head_dim;
        const long long angles = static_cast<long long>(row) * half;
        if (wide) {
            turn_row<WIDE>(x + start, cos + angles, sin + angles, y + start, heads, half, direction);
        } else {
            turn_row<1>(x + start, cos + angles, sin + angles, y + start, heads, half, direction);
        }
    }
}
