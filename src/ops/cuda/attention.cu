// Attention over segments of flat rows and its gradients, in memory linear in the length. The meaning is that of
// src/ops/attention/mod.rs; compiled once per head size, with -DHEAD_DIM (1 to 256).
//
// q, out and their gradients are (rows, heads · HEAD_DIM); k, v and theirs (key rows, key_value_heads · HEAD_DIM); all
// pointers are aligned to 16 bytes. log_sum_exp and delta are (heads, rows) in f32, for these kernels alone
// (log_sum_exp is of base 2).
//
// Shapes as scalars, the same for all kernels: rows of q; heads; key_value_heads; scale (positive); soft_cap (0: none);
// and how far a query sees, in keys before and after its own (UNLIMITED = 1 << 30 for as far as the segment reaches):
//     causal: before = window - 1 or UNLIMITED, after = 0        in both directions: after = before
//
// Tiles: rows of five ints that the host makes of the segments, in their order:
//     queries.start, queries.len, keys.start, keys.len, first
// where `first` is the tile's first query, for attention_key_value_gradients its first key, counted in the segment:
//     for first in (0..queries.len).step_by(tile), or (0..keys.len), there also where there are no queries
//
// Sizes by row_bytes, which is HEAD_DIM rounded up to a multiple of 16, times the bytes of a real:
//
//     row_bytes                                <= 128    <= 256    <= 512    more
//     threads                                     128       128       128      64    of a block of the tiled kernels
//     stages                                        2         2         1       1
//     attention_forward              tile         128       128        64      32    queries
//                                    step          64        48        32      32    keys
//     attention_query_gradients      tile         128        64        64      32    queries
//                                    step          32        32        16      16    keys
//     attention_key_value_gradients  tile          64        64        64      32    keys
//                                    step          64        32        16      16    queries
//
//     kernel                         grid                          bytes of dynamic shared memory
//     attention_forward              (heads, tiles)                (tile + 2 · step) · (row_bytes + 16)
//     attention_delta                ceil(rows · heads / 8)        none; 256 threads
//     attention_query_gradients      (heads, tiles)                2 · (tile + stages · step) · (row_bytes + 16)
//     attention_key_value_gradients  (key_value_heads, tiles)      the same + 8 · stages · step
//
// At most 101,376 bytes (what compute capability 8.6 has); the host allows each kernel its bytes where they are more
// than 48 KiB. attention_delta runs before the gradients, which may run in any order. It needs what attention returned,
// so on the GPU the softmax keeps that too: to find `δ = Σ p · dout vᵀ` without it costs two more products than the
// seven of both gradients, a quarter of the time, to spare 1/12 of what a block keeps. Gradients of keys in no segment
// are not written.
//
// extern "C" __global__ void attention_forward(
//     const real* q, const real* k, const real* v, real* out, float* log_sum_exp, const int* tiles,
//     int rows, int heads, int key_value_heads, float scale, float soft_cap, int before, int after)
// extern "C" __global__ void attention_delta(
//     const real* out, const real* dout, float* delta, int rows, int heads)
// extern "C" __global__ void attention_query_gradients(
//     const real* q, const real* k, const real* v, const real* dout, const float* log_sum_exp, const float* delta,
//     real* dq, const int* tiles,
//     int rows, int heads, int key_value_heads, float scale, float soft_cap, int before, int after)
// extern "C" __global__ void attention_key_value_gradients(
//     const real* q, const real* k, const real* v, const real* dout, const float* log_sum_exp, const float* delta,
//     real* dk /* may be null */, real* dv /* may be null */, const int* tiles,
//     int rows, int heads, int key_value_heads, float scale, float soft_cap, int before, int after)

constexpr int HEAD_WIDTH = (HEAD_DIM + 15) / 16 * 16;
constexpr int ROW_BYTES = HEAD_WIDTH * sizeof(real);
constexpr int THREADS = ROW_BYTES <= 512 ? 128 : 64;
constexpr int STAGES = ROW_BYTES <= 256 ? 2 : 1;
constexpr int FORWARD_TILE = ROW_BYTES <= 256 ? THREADS : THREADS / 2;
constexpr int FORWARD_STEP = ROW_BYTES <= 128 ? 64 : ROW_BYTES <= 256 ? 48 : 32;
constexpr int QUERY_TILE = ROW_BYTES <= 128 ? THREADS : THREADS / 2;
constexpr int QUERY_STEP = ROW_BYTES <= 256 ? 32 : 16;
constexpr int KEY_TILE = THREADS / 2;
constexpr int KEY_STEP = ROW_BYTES <= 128 ? 64 : ROW_BYTES <= 256 ? 32 : 16;
// Blocks that share a multiprocessor, at least: as many as find their registers, which are fewer where narrow rows are
// in f32, or their copies do not divide evenly among the threads.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool HOPPER = false;
#else
constexpr bool HOPPER = true;
#endif
constexpr bool NARROW_FLOATS = sizeof(real) == sizeof(float) && ROW_BYTES <= 128;
constexpr bool UNEVEN = THREADS % (HEAD_WIDTH / WIDE) != 0;
constexpr int FORWARD_BLOCKS = ROW_BYTES <= 512 ? 2 : 1;
constexpr int QUERY_BLOCKS = ROW_BYTES <= (HOPPER ? 256 : 64) && !NARROW_FLOATS ? 3 : ROW_BYTES <= 512 ? 2 : 1;
constexpr int KEY_BLOCKS = ROW_BYTES <= (HOPPER ? 128 : 64) && !NARROW_FLOATS && !UNEVEN ? 3 : ROW_BYTES <= 512 ? 2 : 1;

// Values from one row in shared memory to the next: an odd multiple of 16 bytes, so that 8 rows lie in different banks.
constexpr int ROW = HEAD_WIDTH + WIDE;

constexpr float LOG2_E = 1.4426950408889634f;

typedef __nv_bfloat16 bfloat;

// The score of what is not seen.
__device__ __forceinline__ float unseen() { return __int_as_float(0xff800000); }

// --- what the hardware has instructions for ---

// Four 8 × 8 matrices of 16-bit values in shared memory: lane l gives the address of row l % 8 of matrix l / 8, and
// gets of each the values 2 · (l % 4) and the next of row l / 4.
__device__ __forceinline__ void load_matrices(unsigned (&matrices)[4], const bfloat* row) {
#ifdef RETUNE_STAND_IN
    unsigned rows[32][4];
    stand_in_exchange(row, sizeof rows[0], rows);
    const int lane = threadIdx.x % WARP;
    for (int i = 0; i < 4; i++) matrices[i] = rows[i * 8 + lane / 4][lane % 4];
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
                 : "memory");
#endif
}

// The same of the transposed matrices: rows 2 · (l % 4) and the next, value l / 4.
__device__ __forceinline__ void load_transposed(unsigned (&matrices)[4], const bfloat* row) {
#ifdef RETUNE_STAND_IN
    unsigned short rows[32][8];
    stand_in_exchange(row, sizeof rows[0], rows);
    const int lane = threadIdx.x % WARP;
    for (int i = 0; i < 4; i++) {
        const int first = i * 8 + lane % 4 * 2;
        matrices[i] = rows[first][lane / 4] | static_cast<unsigned>(rows[first + 1][lane / 4]) << 16;
    }
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
                 : "memory");
#endif
}

// `sums += left · right` with 16 × 16 values of `left` and 16 × 8 of `right`, as `Fragment` lays them out.
__device__ __forceinline__ void multiply_add(float (&sums)[4], const unsigned (&left)[4], unsigned right_0,
                                             unsigned right_1) {
#ifdef RETUNE_STAND_IN
    const unsigned mine[6] = {left[0], left[1], left[2], left[3], right_0, right_1};
    unsigned all[32][6];
    stand_in_exchange(mine, sizeof mine, all);
    const int lane = threadIdx.x % WARP;
    const auto value = [](unsigned pair, int i) { return __uint_as_float((i % 2 ? pair >> 16 : pair & 0xffff) << 16); };
    for (int i = 0; i < 4; i++) {
        for (int k = 0; k < 16; k++) {
            const float a = value(all[lane / 4 * 4 + k % 8 / 2][k / 8 * 2 + i / 2], k);
            const float b = value(all[(lane % 4 * 2 + i % 2) * 4 + k % 8 / 2][4 + k / 8], k);
            sums[i] += a * b;
        }
    }
#else
    // Volatile: all lanes must come to it together, so it may be neither moved into a branch nor doubled.
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right_0), "r"(right_1));
#endif
}

// Two values in bf16, the first in the low half.
__device__ __forceinline__ unsigned narrow_pair(float first, float second) {
#ifdef RETUNE_STAND_IN
    const Pack<bfloat, 2> pair = {{narrow<bfloat>(first), narrow<bfloat>(second)}};
    unsigned bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
#else
    unsigned bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
    return bits;
#endif
}

// 2ˣ, to two units in the last place.
__device__ __forceinline__ float power_of_two(float x) {
#ifdef RETUNE_STAND_IN
    return exp2f(x);
#else
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
#endif
}

// Starts to copy `BYTES` (4 or 16) to shared memory, zeros unless `inside`.
template <int BYTES> __device__ __forceinline__ void start_copy(void* to, const void* from, bool inside) {
#ifdef RETUNE_STAND_IN
    if (inside) {
        memcpy(to, from, BYTES);
    } else {
        memset(to, 0, BYTES);
    }
#else
    const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(to));
    const int there = inside ? BYTES : 0;
    if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(from), "r"(there) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(from), "n"(BYTES), "r"(there)
                     : "memory");
    }
#endif
}

// Waits for all copies that this thread has started.
__device__ __forceinline__ void finish_copies() {
#ifndef RETUNE_STAND_IN
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// --- parts of matrices ---

// 16 · STRIPS rows of a matrix in the registers of a warp. Of 16 rows and 8 columns lane l has the columns 2 · (l % 4)
// and the next of row l / 4 (values 0 and 1) and of row l / 4 + 8 (values 2 and 3).
template <int STRIPS, int COLUMNS> struct Fragment {
    float values[STRIPS][COLUMNS / 8][4] = {};

    // Calls `visit(value, strip, eight, i)` for each value of this lane.
    template <typename Visit> __device__ __forceinline__ void each(Visit visit) {
#pragma unroll
        for (int strip = 0; strip < STRIPS; strip++) {
#pragma unroll
            for (int eight = 0; eight < COLUMNS / 8; eight++) {
#pragma unroll
                for (int i = 0; i < 4; i++) visit(values[strip][eight][i], strip, eight, i);
            }
        }
    }
};

// Where the first value of the calling lane is in a fragment.
__device__ __forceinline__ int lane_row() { return threadIdx.x % WARP / 4; }
__device__ __forceinline__ int lane_column() { return threadIdx.x % 4 * 2; }

// `sums += rows · columnsᵀ` over the values of a head; both lie in shared memory, `columns` as rows too.
template <int STRIPS, int COLUMNS>
__device__ __forceinline__ void multiply_rows(Fragment<STRIPS, COLUMNS>& sums, const bfloat* rows,
                                              const bfloat* columns) {
    const int lane = threadIdx.x % WARP;
    rows += lane % 16 * ROW + lane / 16 * 8;
    columns += (lane / 16 * 8 + lane % 8) * ROW + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < HEAD_WIDTH; k += 16) {
        unsigned left[STRIPS][4];
#pragma unroll
        for (int strip = 0; strip < STRIPS; strip++) load_matrices(left[strip], rows + strip * 16 * ROW + k);
#pragma unroll
        for (int eight = 0; eight < COLUMNS / 8; eight += 2) {
            unsigned right[4];
            load_matrices(right, columns + eight * 8 * ROW + k);
#pragma unroll
            for (int strip = 0; strip < STRIPS; strip++) {
                multiply_add(sums.values[strip][eight], left[strip], right[0], right[1]);
                multiply_add(sums.values[strip][eight + 1], left[strip], right[2], right[3]);
            }
        }
    }
}

template <int STRIPS, int COLUMNS>
__device__ __forceinline__ void multiply_rows(Fragment<STRIPS, COLUMNS>& sums, const float* rows,
                                              const float* columns) {
    rows += lane_row() * ROW;
    columns += lane_column() * ROW;
#pragma unroll 2
    for (int k = 0; k < HEAD_WIDTH; k += 4) {
        Pack<float, 4> left[STRIPS][2];
#pragma unroll
        for (int strip = 0; strip < STRIPS; strip++) {
#pragma unroll
            for (int half = 0; half < 2; half++) left[strip][half] = load<4>(rows + (strip * 16 + half * 8) * ROW + k);
        }
#pragma unroll
        for (int eight = 0; eight < COLUMNS / 8; eight++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const Pack<float, 4> right = load<4>(columns + (eight * 8 + i) * ROW + k);
#pragma unroll
                for (int strip = 0; strip < STRIPS; strip++) {
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        float& sum = sums.values[strip][eight][half * 2 + i];
#pragma unroll
                        for (int value = 0; value < 4; value++) {
                            sum = fmaf(left[strip][half].values[value], right.values[value], sum);
                        }
                    }
                }
            }
        }
    }
}

// `sums += weights · rows`, with as many rows in shared memory as `weights` has columns.
template <int STRIPS, int ROWS>
__device__ __forceinline__ void multiply_weights(Fragment<STRIPS, HEAD_WIDTH>& sums,
                                                 const Fragment<STRIPS, ROWS>& weights, const bfloat* rows) {
    const int lane = threadIdx.x % WARP;
    rows += lane % 16 * ROW + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < ROWS; k += 16) {
        unsigned left[STRIPS][4];
#pragma unroll
        for (int strip = 0; strip < STRIPS; strip++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float* pair = &weights.values[strip][k / 8 + i / 2][i % 2 * 2];
                left[strip][i] = narrow_pair(pair[0], pair[1]);
            }
        }
#pragma unroll
        for (int eight = 0; eight < HEAD_WIDTH / 8; eight += 2) {
            unsigned right[4];
            load_transposed(right, rows + k * ROW + eight * 8);
#pragma unroll
            for (int strip = 0; strip < STRIPS; strip++) {
                multiply_add(sums.values[strip][eight], left[strip], right[0], right[1]);
                multiply_add(sums.values[strip][eight + 1], left[strip], right[2], right[3]);
            }
        }
    }
}

template <int STRIPS, int ROWS>
__device__ __forceinline__ void multiply_weights(Fragment<STRIPS, HEAD_WIDTH>& sums,
                                                 const Fragment<STRIPS, ROWS>& weights, const float* rows) {
    rows += lane_column();
#pragma unroll
    for (int k = 0; k < ROWS; k++) {
        // The lane of the four with this row that has the weight.
        const int holder = threadIdx.x % WARP / 4 * 4 + k % 8 / 2;
        float left[STRIPS][2];
#pragma unroll
        for (int strip = 0; strip < STRIPS; strip++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                left[strip][half] = __shfl_sync(ALL_LANES, weights.values[strip][k / 8][half * 2 + k % 2], holder);
            }
        }
#pragma unroll
        for (int eight = 0; eight < HEAD_WIDTH / 8; eight++) {
            const Pack<float, 2> right = load<2>(rows + k * ROW + eight * 8);
#pragma unroll
            for (int strip = 0; strip < STRIPS; strip++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float& sum = sums.values[strip][eight][i];
                    sum = fmaf(left[strip][i / 2], right.values[i % 2], sum);
                }
            }
        }
    }
}

// Starts to copy the columns of one head to shared memory: `ROWS` rows, of which only the first `there` exist. What is
// not there becomes zero: it is multiplied by zero too, and what lies there by chance may be NaN.
template <int ROWS>
__device__ __forceinline__ void copy_rows(real* to, const real* from, long long features, int there) {
    if constexpr (HEAD_DIM % WIDE == 0) {
        // Each thread keeps to its column, for the sake of few registers.
        constexpr int COPIES = HEAD_WIDTH / WIDE;
        constexpr int AT_ONCE = THREADS / COPIES;
        const int first = threadIdx.x / COPIES, column = threadIdx.x % COPIES * WIDE;
        if (first >= AT_ONCE) return;
        to += first * ROW + column;
        from += first * features + column;
        // The widest rows leave no registers for the addresses of many.
        constexpr int UNROLLED = AT_ONCE == 1 ? 8 : ROWS;
#pragma unroll UNROLLED
        for (int row = 0; row < ROWS; row += AT_ONCE) {
            if (ROWS % AT_ONCE != 0 && row + first >= ROWS) break;
            const bool inside = row + first < there && column < HEAD_DIM;
            start_copy<16>(to + row * ROW, from, inside);
            from += AT_ONCE * features;
        }
    } else {
        for (int value = threadIdx.x; value < ROWS * HEAD_WIDTH; value += THREADS) {
            const int row = value / HEAD_WIDTH, column = value % HEAD_WIDTH;
            const bool inside = row < there && column < HEAD_DIM;
            to[row * ROW + column] = inside ? from[row * features + column] : narrow<real>(0.0f);
        }
    }
}

// Writes a warp's rows times `factors`; of them `there` exist.
template <int STRIPS>
__device__ __forceinline__ void write_rows(real* to, const Fragment<STRIPS, HEAD_WIDTH>& rows,
                                           const float (&factors)[STRIPS][2], long long features, int there) {
#pragma unroll
    for (int strip = 0; strip < STRIPS; strip++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = strip * 16 + half * 8 + lane_row();
            if (row >= there) continue;
#pragma unroll
            for (int eight = 0; eight < HEAD_WIDTH / 8; eight++) {
                const int column = eight * 8 + lane_column();
                const float* values = &rows.values[strip][eight][half * 2];
                const Pack<real, 2> pair = {
                    {narrow<real>(values[0] * factors[strip][half]), narrow<real>(values[1] * factors[strip][half])}};
                real* target = to + row * features + column;
                if constexpr (HEAD_DIM % 2 == 0) {
                    if (column < HEAD_DIM) store<2>(target, pair);
                } else {
                    if (column < HEAD_DIM) target[0] = pair.values[0];
                    if (column + 1 < HEAD_DIM) target[1] = pair.values[1];
                }
            }
        }
    }
}

// --- scores ---

// A row of the host's table.
struct Tile {
    int query_start, queries, key_start, keys, first;

    __device__ __forceinline__ Tile(const int* tiles, int index) {
        const int* tile = tiles + index * 5LL;
        query_start = tile[0], queries = tile[1], key_start = tile[2], keys = tile[3], first = tile[4];
    }

    // Where the first query is among the keys.
    __device__ __forceinline__ int offset() const { return keys - queries; }
};

// The scalars of all kernels.
struct Shape {
    int rows, heads, key_value_heads;
    float scale, soft_cap;
    int before, after;

    // Values of a row of q, and of one of k.
    __device__ __forceinline__ long long features() const { return static_cast<long long>(heads) * HEAD_DIM; }
    __device__ __forceinline__ long long key_features() const {
        return static_cast<long long>(key_value_heads) * HEAD_DIM;
    }
    // Query heads that share a head of keys.
    __device__ __forceinline__ int group() const { return heads / key_value_heads; }
    // Where log_sum_exp and delta have this.
    __device__ __forceinline__ long long at(int head, long long row) const {
        return static_cast<long long>(head) * rows + row;
    }
};

// Rows of scores and the columns that each of them sees: so many before and after its own position.
struct Sight {
    int before, after;

    __device__ __forceinline__ bool any(int row, int rows, int column, int columns) const {
        return column + columns > row - before && column <= row + rows - 1 + after;
    }

    __device__ __forceinline__ bool all(int row, int rows, int column, int columns) const {
        return column >= row + rows - 1 - before && column + columns - 1 <= row + after;
    }
};

// Hides what is not seen, and columns from `end` on. `row` and `column` are the positions of the first ones.
template <int STRIPS, int COLUMNS>
__device__ __forceinline__ void hide(Fragment<STRIPS, COLUMNS>& scores, Sight sight, int row, int column, int end) {
    if (sight.all(row, STRIPS * 16, column, COLUMNS) && column + COLUMNS <= end) return;
    row += lane_row();
    column += lane_column();
    scores.each([&](float& score, int strip, int eight, int i) {
        const int from = row + strip * 16 + i / 2 * 8 - sight.before;
        const int to = min(row + strip * 16 + i / 2 * 8 + sight.after, end - 1);
        // One comparison for both ends: what lies before the first wraps round to a large number. Rows that exist see
        // at least one column, so `to` is not before `from`.
        const unsigned at = column - from + eight * 8 + i % 2;
        if (at > static_cast<unsigned>(to - from)) score = unseen();
    });
}

// From products `q kᵀ` to the powers of two of a softmax: `factor · x`, where x is the product itself or, with a soft
// cap, `tanh(slope · product)`.
struct Scale {
    float factor, slope;

    __device__ __forceinline__ Scale(const Shape& shape)
        : factor((shape.soft_cap > 0 ? shape.soft_cap : shape.scale) * LOG2_E),
          slope(shape.soft_cap > 0 ? shape.scale / shape.soft_cap : 0) {}

    __device__ __forceinline__ bool capped() const { return slope != 0; }
};

// The softmax of each of a lane's rows, as far as it has come.
template <int STRIPS> struct Softmax {
    float maxima[STRIPS][2], sums[STRIPS][2];

    __device__ __forceinline__ Softmax() {
#pragma unroll
        for (int strip = 0; strip < STRIPS; strip++) {
#pragma unroll
            for (int half = 0; half < 2; half++) maxima[strip][half] = unseen(), sums[strip][half] = 0;
        }
    }

    // Turns scores into weights and scales what the earlier ones have `mixed` to the new maximum.
    template <int COLUMNS>
    __device__ __forceinline__ void extend(Fragment<STRIPS, COLUMNS>& scores, Fragment<STRIPS, HEAD_WIDTH>& mixed,
                                           float factor) {
#pragma unroll
        for (int strip = 0; strip < STRIPS; strip++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float maximum = maxima[strip][half];
#pragma unroll
                for (int eight = 0; eight < COLUMNS / 8; eight++) {
                    const float* pair = &scores.values[strip][eight][half * 2];
                    maximum = fmaxf(maximum, fmaxf(pair[0], pair[1]));
                }
                maximum = fmaxf(maximum, __shfl_xor_sync(ALL_LANES, maximum, 1));
                maximum = fmaxf(maximum, __shfl_xor_sync(ALL_LANES, maximum, 2));
                // A row that has seen nothing so far has weights of 0, not of ∞ - ∞.
                const float offset = maximum == unseen() ? 0 : maximum * factor;
                const float shrink = power_of_two(fmaf(maxima[strip][half], factor, -offset));
                maxima[strip][half] = maximum;
                float sum = 0;
#pragma unroll
                for (int eight = 0; eight < COLUMNS / 8; eight++) {
                    float* pair = &scores.values[strip][eight][half * 2];
                    pair[0] = power_of_two(fmaf(pair[0], factor, -offset));
                    pair[1] = power_of_two(fmaf(pair[1], factor, -offset));
                    sum += pair[0] + pair[1];
                }
                sums[strip][half] = fmaf(sums[strip][half], shrink, sum);
#pragma unroll
                for (int eight = 0; eight < HEAD_WIDTH / 8; eight++) {
                    mixed.values[strip][eight][half * 2] *= shrink;
                    mixed.values[strip][eight][half * 2 + 1] *= shrink;
                }
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS)
    attention_forward(const real* q, const real* k, const real* v, real* out, float* log_sum_exp, const int* tiles,
                      int rows, int heads, int key_value_heads, float scale, float soft_cap, int before, int after) {
    SHARED_MEMORY(real, query_rows);
    real* key_rows = query_rows + FORWARD_TILE * ROW;
    real* value_rows = key_rows + FORWARD_STEP * ROW;
    constexpr int WARP_ROWS = FORWARD_TILE / (THREADS / WARP);
    constexpr int STRIPS = WARP_ROWS / 16;

    // The last queries of a segment see the most keys: they begin first, so that no long one is left for the end.
    const Tile tile(tiles, gridDim.y - 1 - blockIdx.y);
    const Shape shape = {rows, heads, key_value_heads, scale, soft_cap, before, after};
    const int head = blockIdx.x;
    const int key_head = head / shape.group();
    const long long features = shape.features(), key_features = shape.key_features();
    const long long query_start = tile.query_start + tile.first;
    const int queries = min(FORWARD_TILE, tile.queries - tile.first);
    const int position = tile.offset() + tile.first;
    const int first_key = max(0, position - before);
    const int end_key = min(tile.keys, position + queries + after);
    k += tile.key_start * key_features + key_head * HEAD_DIM;
    v += tile.key_start * key_features + key_head * HEAD_DIM;

    copy_rows<FORWARD_TILE>(query_rows, q + query_start * features + head * HEAD_DIM, features, queries);
    copy_rows<FORWARD_STEP>(key_rows, k + first_key * key_features, key_features, end_key - first_key);

    const int warp_row = threadIdx.x / WARP * WARP_ROWS;
    const Sight sight = {before, after};
    const Scale scaling(shape);
    Fragment<STRIPS, HEAD_WIDTH> mixed;
    Softmax<STRIPS> softmax;
    for (int key = first_key; key < end_key; key += FORWARD_STEP) {
        const bool seen = warp_row < queries && sight.any(position + warp_row, WARP_ROWS, key, FORWARD_STEP);
        finish_copies();
        __syncthreads();
        copy_rows<FORWARD_STEP>(value_rows, v + key * key_features, key_features, end_key - key);
        Fragment<STRIPS, FORWARD_STEP> scores;
        if (seen) multiply_rows(scores, query_rows + warp_row * ROW, key_rows);
        finish_copies();
        __syncthreads();
        const int next = key + FORWARD_STEP;
        if (next < end_key) copy_rows<FORWARD_STEP>(key_rows, k + next * key_features, key_features, end_key - next);
        if (!seen) continue;
        if (scaling.capped()) scores.each([&](float& score, int, int, int) { score = tanhf(score * scaling.slope); });
        hide(scores, sight, position + warp_row, key, tile.keys);
        softmax.extend(scores, mixed, scaling.factor);
        multiply_weights(mixed, scores, value_rows);
    }

    float inverse_sums[STRIPS][2];
#pragma unroll
    for (int strip = 0; strip < STRIPS; strip++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = softmax.sums[strip][half];
            sum += __shfl_xor_sync(ALL_LANES, sum, 1);
            sum += __shfl_xor_sync(ALL_LANES, sum, 2);
            inverse_sums[strip][half] = 1.0f / sum;
            const int row = warp_row + strip * 16 + half * 8 + lane_row();
            if (lane_column() == 0 && row < queries) {
                log_sum_exp[shape.at(head, query_start + row)] =
                    fmaf(softmax.maxima[strip][half], scaling.factor, log2f(sum));
            }
        }
    }
    out += (query_start + warp_row) * features + head * HEAD_DIM;
    write_rows(out, mixed, inverse_sums, features, queries - warp_row);
}

// --- gradients ---

// `δ = Σ out · dout` of each row and head; one warp for each.
extern "C" __global__ void attention_delta(const real* out, const real* dout, float* delta, int rows, int heads) {
    const long long index = blockIdx.x * static_cast<long long>(blockDim.x / WARP) + threadIdx.x / WARP;
    if (index >= static_cast<long long>(rows) * heads) return;
    constexpr int AT_ONCE = HEAD_DIM % 2 == 0 ? 2 : 1;
    float sum = 0;
    for (int column = threadIdx.x % WARP * AT_ONCE; column < HEAD_DIM; column += WARP * AT_ONCE) {
        const auto a = load<AT_ONCE>(out + index * HEAD_DIM + column);
        const auto b = load<AT_ONCE>(dout + index * HEAD_DIM + column);
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) sum = fmaf(widen(a.values[i]), widen(b.values[i]), sum);
    }
    sum = sum_warp(sum);
    if (threadIdx.x % WARP == 0) delta[index % heads * rows + index / heads] = sum;
}

// Turns products `q kᵀ` into the softmax's weights and products `dout vᵀ` into gradients of the scaled scores.
// `log_sum_exp(strip, eight, i)` and `delta` are those of the query of a value.
template <int STRIPS, int COLUMNS, typename LogSumExp, typename Delta, typename Hide>
__device__ __forceinline__ void differentiate(Fragment<STRIPS, COLUMNS>& scores, Fragment<STRIPS, COLUMNS>& errors,
                                              Scale scaling, LogSumExp log_sum_exp, Delta delta, Hide hide_unseen) {
    errors.each([&](float& error, int strip, int eight, int i) { error -= delta(strip, eight, i); });
    if (scaling.capped()) {
        errors.each([&](float& error, int strip, int eight, int i) {
            float& score = scores.values[strip][eight][i];
            score = tanhf(score * scaling.slope);
            error *= 1 - score * score;
        });
    }
    hide_unseen();
    errors.each([&](float& error, int strip, int eight, int i) {
        float& score = scores.values[strip][eight][i];
        score = power_of_two(fmaf(score, scaling.factor, -log_sum_exp(strip, eight, i)));
        error *= score;
    });
}

extern "C" __global__ void __launch_bounds__(THREADS, QUERY_BLOCKS)
    attention_query_gradients(const real* q, const real* k, const real* v, const real* dout, const float* log_sum_exp,
                              const float* delta, real* dq, const int* tiles, int rows, int heads, int key_value_heads,
                              float scale, float soft_cap, int before, int after) {
    SHARED_MEMORY(real, query_rows);
    real* error_rows = query_rows + QUERY_TILE * ROW;
    real* stages = error_rows + QUERY_TILE * ROW;
    constexpr int WARP_ROWS = QUERY_TILE / (THREADS / WARP);
    constexpr int STRIPS = WARP_ROWS / 16;

    const Tile tile(tiles, gridDim.y - 1 - blockIdx.y);
    const Shape shape = {rows, heads, key_value_heads, scale, soft_cap, before, after};
    const int head = blockIdx.x;
    const int key_head = head / shape.group();
    const long long features = shape.features(), key_features = shape.key_features();
    const long long query_start = tile.query_start + tile.first;
    const int queries = min(QUERY_TILE, tile.queries - tile.first);
    const int position = tile.offset() + tile.first;
    const int first_key = max(0, position - before);
    const int end_key = min(tile.keys, position + queries + after);
    k += tile.key_start * key_features + key_head * HEAD_DIM;
    v += tile.key_start * key_features + key_head * HEAD_DIM;

    // Keys and below them values.
    const auto copy_step = [&](int key, int stage) {
        real* to = stages + stage * 2 * QUERY_STEP * ROW;
        copy_rows<QUERY_STEP>(to, k + key * key_features, key_features, end_key - key);
        copy_rows<QUERY_STEP>(to + QUERY_STEP * ROW, v + key * key_features, key_features, end_key - key);
    };
    copy_rows<QUERY_TILE>(query_rows, q + query_start * features + head * HEAD_DIM, features, queries);
    copy_rows<QUERY_TILE>(error_rows, dout + query_start * features + head * HEAD_DIM, features, queries);
    copy_step(first_key, 0);

    const int warp_row = threadIdx.x / WARP * WARP_ROWS;
    float log_sums[STRIPS][2], deltas[STRIPS][2], factors[STRIPS][2];
#pragma unroll
    for (int strip = 0; strip < STRIPS; strip++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = warp_row + strip * 16 + half * 8 + lane_row();
            const long long at = shape.at(head, query_start + row);
            log_sums[strip][half] = row < queries ? log_sum_exp[at] : 0;
            deltas[strip][half] = row < queries ? delta[at] : 0;
            factors[strip][half] = scale;
        }
    }
    const Sight sight = {before, after};
    const Scale scaling(shape);
    Fragment<STRIPS, HEAD_WIDTH> gradient;
    int stage = 0;
    for (int key = first_key; key < end_key; key += QUERY_STEP) {
        const int next = key + QUERY_STEP;
        finish_copies();
        __syncthreads();
        if (STAGES > 1 && next < end_key) copy_step(next, 1 - stage);
        const real* key_rows = stages + stage * 2 * QUERY_STEP * ROW;
        const real* value_rows = key_rows + QUERY_STEP * ROW;
        if (warp_row < queries && sight.any(position + warp_row, WARP_ROWS, key, QUERY_STEP)) {
            Fragment<STRIPS, QUERY_STEP> scores, errors;
            multiply_rows(scores, query_rows + warp_row * ROW, key_rows);
            multiply_rows(errors, error_rows + warp_row * ROW, value_rows);
            differentiate(
                scores, errors, scaling, [&](int strip, int, int i) { return log_sums[strip][i / 2]; },
                [&](int strip, int, int i) { return deltas[strip][i / 2]; },
                [&] { hide(scores, sight, position + warp_row, key, tile.keys); });
            multiply_weights(gradient, errors, key_rows);
        }
        if (STAGES > 1) {
            stage = 1 - stage;
        } else if (next < end_key) {
            __syncthreads();
            copy_step(next, 0);
        }
    }
    dq += (query_start + warp_row) * features + head * HEAD_DIM;
    write_rows(dq, gradient, factors, features, queries - warp_row);
}

// What both passes over a tile of keys read.
struct GradientArguments {
    const real *q, *k, *v, *dout;
    const float *log_sum_exp, *delta;
};

// The gradients of a tile's keys, of its values, or both, over all query heads that share them.
template <bool KEYS, bool VALUES>
__device__ __forceinline__ void key_value_gradients(const GradientArguments& given, real* dk, real* dv,
                                                    const Tile& tile, const Shape& shape, real* key_rows) {
    real* value_rows = key_rows + KEY_TILE * ROW;
    real* stages = value_rows + KEY_TILE * ROW;
    float* all_log_sums = reinterpret_cast<float*>(stages + STAGES * 2 * KEY_STEP * ROW);
    float* all_deltas = all_log_sums + STAGES * KEY_STEP;

    const int key_head = blockIdx.x;
    const int end_head = (key_head + 1) * shape.group();
    const long long features = shape.features(), key_features = shape.key_features();
    const int keys = min(KEY_TILE, tile.keys - tile.first);
    const long long key_start = (tile.key_start + tile.first) * key_features + key_head * HEAD_DIM;
    // Of the queries, by the positions of their own keys.
    const int first_query = max(tile.offset(), tile.first - shape.after);
    const int end_query = min(tile.keys, tile.first + keys + shape.before);

    // Queries, below them the gradients of what they mixed; beside both, their sums and deltas.
    const auto copy_step = [&](int head, int query, int stage) {
        const long long row = tile.query_start + query - tile.offset();
        const long long from = row * features + head * HEAD_DIM;
        const int there = end_query - query;
        real* to = stages + stage * 2 * KEY_STEP * ROW;
        copy_rows<KEY_STEP>(to, given.q + from, features, there);
        copy_rows<KEY_STEP>(to + KEY_STEP * ROW, given.dout + from, features, there);
        const int i = threadIdx.x;
        if (i < KEY_STEP) {
            const long long at = shape.at(head, row) + (i < there ? i : 0);
            start_copy<4>(all_log_sums + stage * KEY_STEP + i, given.log_sum_exp + at, i < there);
            start_copy<4>(all_deltas + stage * KEY_STEP + i, given.delta + at, i < there);
        }
    };
    copy_rows<KEY_TILE>(key_rows, given.k + key_start, key_features, keys);
    copy_rows<KEY_TILE>(value_rows, given.v + key_start, key_features, keys);
    int head = first_query < end_query ? key_head * shape.group() : end_head;
    int query = first_query;
    int stage = 0;
    if (head < end_head) copy_step(head, query, stage);

    const int warp_row = threadIdx.x / WARP * 16;
    // Seen from the keys: a query that sees what is `before` itself comes after it.
    const Sight sight = {shape.after, shape.before};
    const Scale scaling(shape);
    Fragment<1, HEAD_WIDTH> key_gradient, value_gradient;
    while (head < end_head) {
        const bool last = query + KEY_STEP >= end_query;
        const int next = last ? first_query : query + KEY_STEP;
        const int next_head = head + last;
        finish_copies();
        __syncthreads();
        if (STAGES > 1 && next_head < end_head) copy_step(next_head, next, 1 - stage);
        const real* query_rows = stages + stage * 2 * KEY_STEP * ROW;
        const real* error_rows = query_rows + KEY_STEP * ROW;
        const float* log_sums = all_log_sums + stage * KEY_STEP + lane_column();
        const float* deltas = all_deltas + stage * KEY_STEP + lane_column();
        if (warp_row < keys && sight.any(tile.first + warp_row, 16, query, KEY_STEP)) {
            Fragment<1, KEY_STEP> scores, errors;
            multiply_rows(scores, key_rows + warp_row * ROW, query_rows);
            if constexpr (KEYS) multiply_rows(errors, value_rows + warp_row * ROW, error_rows);
            differentiate(
                scores, errors, scaling, [&](int, int eight, int i) { return log_sums[eight * 8 + i % 2]; },
                [&](int, int eight, int i) { return deltas[eight * 8 + i % 2]; },
                [&] { hide(scores, sight, tile.first + warp_row, query, end_query); });
            if constexpr (VALUES) multiply_weights(value_gradient, scores, error_rows);
            if constexpr (KEYS) multiply_weights(key_gradient, errors, query_rows);
        }
        if (STAGES > 1) {
            stage = 1 - stage;
        } else if (next_head < end_head) {
            __syncthreads();
            copy_step(next_head, next, stage);
        }
        head = next_head;
        query = next;
    }
    // Copies may still be under way where no query sees the keys.
    finish_copies();
    __syncthreads();
    const long long first = key_start + warp_row * key_features;
    if constexpr (KEYS) {
        if (dk) write_rows(dk + first, key_gradient, {{shape.scale, shape.scale}}, key_features, keys - warp_row);
    }
    if constexpr (VALUES) {
        if (dv) write_rows(dv + first, value_gradient, {{1.0f, 1.0f}}, key_features, keys - warp_row);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, KEY_BLOCKS)
    attention_key_value_gradients(const real* q, const real* k, const real* v, const real* dout,
                                  const float* log_sum_exp, const float* delta, real* dk, real* dv, const int* tiles,
                                  int rows, int heads, int key_value_heads, float scale, float soft_cap, int before,
                                  int after) {
    SHARED_MEMORY(real, shared);
    const GradientArguments given = {q, k, v, dout, log_sum_exp, delta};
    const Tile tile(tiles, blockIdx.y);
    const Shape shape = {rows, heads, key_value_heads, scale, soft_cap, before, after};
    if constexpr (HEAD_WIDTH <= 128) {
        key_value_gradients<true, true>(given, dk, dv, tile, shape, shared);
    } else {
        // Both gradients of such wide rows do not fit into the registers at once.
        if (dk) key_value_gradients<true, false>(given, dk, dv, tile, shape, shared);
        if (dv) key_value_gradients<false, true>(given, dk, dv, tile, shape, shared);
    }
}
