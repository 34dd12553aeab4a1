// Sums over rows and over everything, each in an order that depends on the shape alone.

// Columns of a block of `column_sums`.
constexpr int COLUMNS = 256;

// Sums of a block's rows in each of its columns. Threads that read `WIDTH` columns at once are more than a row needs:
// thread group `g` takes the rows g, g + WIDTH, …, and the groups are added up at the end.
template <int WIDTH>
__device__ __forceinline__ void column_sums_block(const real* x, float* partial, int first, int end, int columns) {
    constexpr int GROUP = COLUMNS / WIDTH;
    __shared__ float sums[WIDTH][COLUMNS];
    const int group = threadIdx.x / GROUP;
    const int place = threadIdx.x % GROUP * WIDTH;
    const int column = blockIdx.x * COLUMNS + place;
    Pack<float, WIDTH> sum = {};
    if (column < columns) {
#pragma unroll 4
        for (int row = first + group; row < end; row += WIDTH) {
            const Pack<real, WIDTH> values = load<WIDTH>(x + static_cast<long long>(row) * columns + column);
#pragma unroll
            for (int i = 0; i < WIDTH; i++) sum.values[i] += widen(values.values[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < WIDTH; i++) sums[group][place + i] = sum.values[i];
    __syncthreads();
    const int mine = blockIdx.x * COLUMNS + threadIdx.x;
    if (mine < columns) {
        float total = 0;
#pragma unroll
        for (int group = 0; group < WIDTH; group++) total += sums[group][threadIdx.x];
        partial[static_cast<long long>(blockIdx.y) * columns + mine] = total;
    }
}

// The sum of each column of `x`, (rows, columns), over the rows of a block. `partial` is (grid.y, columns).
// Grid: (ceil(columns / 256), ceil(rows / rows_per_block)), the second at most 65535; blocks of exactly 256 threads.
extern "C" __global__ void __launch_bounds__(COLUMNS)
column_sums(const real* x, float* partial, int rows, int columns, int rows_per_block) {
    const int first = blockIdx.y * rows_per_block;
    const int end = min(rows, first + rows_per_block);
    if (columns % WIDE == 0 && aligned(x)) {
        column_sums_block<WIDE>(x, partial, first, end, columns);
    } else {
        column_sums_block<1>(x, partial, first, end, columns);
    }
}

// The sum of each column of `partial`, (parts, columns), in the order of the parts.
// Grid: ceil(columns / 256), blocks of 256 threads, or any other number with its grid.
extern "C" __global__ void __launch_bounds__(256)
add_partials(const float* __restrict__ partial, float* __restrict__ sums, int parts, int columns) {
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    float sum = 0;
#pragma unroll 16
    for (int part = 0; part < parts; part++) sum += partial[static_cast<long long>(part) * columns + column];
    sums[column] = sum;
}

// The words of one chunk in the table of `adamw.cu`, as far as they are used here.
constexpr int CHUNK_WORDS = 6;
constexpr int CHUNK_GRADIENT = 1;
constexpr int CHUNK_LENGTH = 4;

// partial[chunk] = Σ g² over the gradient of the chunk, in f64. Grid: chunks, blocks of 256 threads.
extern "C" __global__ void __launch_bounds__(256)
squared_norms(const unsigned long long* table, double* partial) {
    const unsigned long long* chunk = table + static_cast<long long>(blockIdx.x) * CHUNK_WORDS;
    const float* gradient = reinterpret_cast<const float*>(chunk[CHUNK_GRADIENT]);
    const int length = chunk[CHUNK_LENGTH];
    const int packs = aligned(gradient) ? length / 4 : 0;
    double sum = 0;
#pragma unroll 4
    for (int pack = threadIdx.x; pack < packs; pack += blockDim.x) {
        const Pack<float, 4> values = load<4>(gradient + pack * 4);
#pragma unroll
        for (int i = 0; i < 4; i++) sum = fma(double(values.values[i]), double(values.values[i]), sum);
    }
    for (int at = packs * 4 + threadIdx.x; at < length; at += blockDim.x) {
        sum = fma(double(gradient[at]), double(gradient[at]), sum);
    }
    sum = sum_block(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// The sum of `count` values. Grid: one block of 256 threads.
extern "C" __global__ void __launch_bounds__(256) add_doubles(const double* partial, int count, double* sum) {
    double part = 0;
    for (int at = threadIdx.x; at < count; at += blockDim.x) part += partial[at];
    part = sum_block(part);
    if (threadIdx.x == 0) *sum = part;
}
