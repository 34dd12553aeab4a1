// Cross-entropy of given logits, and how a model saw given targets.
//
// Launch of both: one block per row, of 64 to 1024 threads; any number serves every size, more are faster from about
// 8192 classes on. No dynamic shared memory. `logits` is (rows, classes) in f32, with one target per row, which is below
// `classes`.

// Logits that are read at once.
constexpr int LOGITS = WIDE;

// `Σ e^(x - maximum)` of a row's logits `x`, and where the maximum is: the first of equals.
struct RowSum {
    float maximum;
    double sum;
    unsigned best;

    __device__ __forceinline__ double log_probability(float logit) const {
        return double(logit) - double(maximum) - log(sum);
    }
};

// Reads the row once: each thread scales what it has summed down when it meets a larger logit.
template <int WIDTH> __device__ __forceinline__ RowSum row_sum(const float* __restrict__ logits, int classes) {
    constexpr unsigned NONE = 0xffffffffu;
    const float lowest = __uint_as_float(0xff800000u);  // -infinity
    float maximum = lowest, sum = 0;
    unsigned best = NONE;
#pragma unroll 2
    for (int at = threadIdx.x * WIDTH; at < classes; at += blockDim.x * WIDTH) {
        const Pack<float, WIDTH> pack = load<WIDTH>(logits + at);
        float largest = pack.values[0];
#pragma unroll
        for (int i = 1; i < WIDTH; i++) largest = fmaxf(largest, pack.values[i]);
        if (largest > maximum) {
            sum *= expf(maximum - largest);
            maximum = largest;
#pragma unroll
            for (int i = WIDTH - 1; i >= 0; i--) best = pack.values[i] == largest ? at + i : best;
        }
        // Where all were impossible so far, `x - maximum` would be NaN.
        const float shift = maximum == lowest ? 0.0f : maximum;
#pragma unroll
        for (int i = 0; i < WIDTH; i++) sum += expf(pack.values[i] - shift);
    }
    RowSum row;
    row.maximum = reduce_block(maximum, lowest, Largest());
    row.sum = sum_block(double(sum) * expf(maximum - row.maximum));
    row.best = reduce_block(maximum == row.maximum ? best : NONE, NONE, Smallest());
    return row;
}

__device__ __forceinline__ RowSum any_row_sum(const float* logits, int classes, bool wide) {
    return wide ? row_sum<LOGITS>(logits, classes) : row_sum<1>(logits, classes);
}

template <int WIDTH>
__device__ __forceinline__ void write_gradient(
    const float* logits, real* gradient, int classes, RowSum row, int target, float factor
) {
    const float scale = factor / row.sum;
#pragma unroll 2
    for (int at = threadIdx.x * WIDTH; at < classes; at += blockDim.x * WIDTH) {
        const Pack<float, WIDTH> pack = load<WIDTH>(logits + at);
        Pack<real, WIDTH> slopes;
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            const float probability = expf(pack.values[i] - row.maximum) * scale;
            slopes.values[i] = narrow<real>(at + i == target ? probability - factor : probability);
        }
        store(gradient + at, slopes);
    }
}

// losses[row] = -log softmax(logits)[target]; gradient = factor · (softmax(logits) - onehot(target)), (rows, classes).
// `gradient` may be null, and is the memory of `logits` or apart from it.
extern "C" __global__ void __launch_bounds__(1024) cross_entropy(
    const float* logits, const unsigned* targets, double* losses, real* gradient, int classes, float factor
) {
    const long long start = static_cast<long long>(blockIdx.x) * classes;
    const int target = targets[blockIdx.x];
    const bool wide = classes % LOGITS == 0 && aligned(logits, gradient);
    const float logit = logits[start + target];
    const RowSum row = any_row_sum(logits + start, classes, wide);
    if (threadIdx.x == 0) losses[blockIdx.x] = -row.log_probability(logit);
    if (!gradient) return;
    if (wide) {
        write_gradient<LOGITS>(logits + start, gradient + start, classes, row, target, factor);
    } else {
        write_gradient<1>(logits + start, gradient + start, classes, row, target, factor);
    }
}

// The two fields of `TokenScore` for each row: the logarithm of the target's probability, and the most probable class,
// the first of equals.
extern "C" __global__ void __launch_bounds__(1024)
score(const float* logits, const unsigned* targets, float* log_probability, unsigned* best, int classes) {
    const float* mine = logits + static_cast<long long>(blockIdx.x) * classes;
    const RowSum row = any_row_sum(mine, classes, classes % LOGITS == 0 && aligned(logits));
    if (threadIdx.x == 0) {
        log_probability[blockIdx.x] = row.log_probability(mine[targets[blockIdx.x]]);
        best[blockIdx.x] = row.best < classes ? row.best : 0;
    }
}
