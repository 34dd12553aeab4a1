// The verdict over a step, `verdict.rs`, and the AdamW step of all weights in one launch, `adamw.rs`: with the same
// roundings in the same order, so nothing here may be contracted.
//
// Weights, gradients and moments are f32. They are cut into chunks; the table has six words for each chunk:
//     address of its weights, of their gradient, of the first moment, of the second moment; number of values; 0
// Grid: chunks, blocks of 256 threads. `chunk_values` is the most values that a chunk has. No dynamic shared memory.

constexpr int CHUNK_WORDS = 6;

// What may be wrong with a step.
constexpr int SOUND = 0;
constexpr int NOT_FINITE = 1;
constexpr int SPIKE = 2;
// The reaction with which the weights move; the other two leave them as they are.
constexpr int TAKE = 0;

// All are f64, so that the host reads them at once.
struct Verdict {
    double loss, gradient_norm, gradient_scale, fault, reaction;
};

// Infinity less itself is NaN.
__device__ __forceinline__ bool is_finite(double value) { return __dsub_rn(value, value) == 0; }

// `losses` are the addresses of the passes' losses, f32. Grid: one block of 32 threads.
extern "C" __global__ void __launch_bounds__(32) judge(
    const unsigned long long* losses, int passes, const double* squared_norm, double target_tokens, double longest,
    double highest_loss, int on_nonfinite, int on_spike, Verdict* verdict
) {
    if (threadIdx.x > 0) return;
    double sum = 0;
    for (int pass = 0; pass < passes; pass++) sum = __dadd_rn(sum, *reinterpret_cast<const float*>(losses[pass]));
    const double loss = __ddiv_rn(sum, target_tokens);
    const double norm = __ddiv_rn(__dsqrt_rn(*squared_norm), target_tokens);
    const double shorter = longest > 0 ? __ddiv_rn(longest, __dadd_rn(norm, 1e-6)) : 1;
    const double clip = shorter < 1 ? shorter : 1;
    const int fault = !(is_finite(loss) && is_finite(norm)) ? NOT_FINITE : loss > highest_loss ? SPIKE : SOUND;
    const int reaction = fault == NOT_FINITE ? on_nonfinite : fault == SPIKE ? on_spike : TAKE;
    verdict->loss = loss;
    verdict->gradient_norm = norm;
    verdict->gradient_scale = __double2float_rn(__ddiv_rn(clip, target_tokens));
    verdict->fault = fault;
    verdict->reaction = reaction;
}

// The numbers of the step, as `adamw.rs` makes them, and the verdict's scale.
struct Step {
    float scale, keep, rate, beta1_rest, beta2, beta2_rest, correction, epsilon;
};

// `gradient` has been scaled.
__device__ __forceinline__ void update(float& weight, float gradient, float& first, float& second, const Step& step) {
    // torch's `lerp`
    const float way = __fsub_rn(gradient, first);
    first = fabsf(step.beta1_rest) < 0.5f ? __fmaf_rn(step.beta1_rest, way, first)
                                          : __fmaf_rn(__fsub_rn(step.beta1_rest, 1.0f), way, gradient);
    second = __fadd_rn(
        __fmul_rn(second, step.beta2), __fmul_rn(__fmul_rn(step.beta2_rest, gradient), gradient)
    );
    const float size = __fadd_rn(__fdiv_rn(__fsqrt_rn(second), step.correction), step.epsilon);
    weight = __fadd_rn(__fmul_rn(weight, step.keep), __fdiv_rn(__fmul_rn(step.rate, first), size));
}

template <int WIDTH>
__device__ __forceinline__ void update_pack(
    float* weight, const float* gradient, float* first, float* second, const Step& step
) {
    Pack<float, WIDTH> weights = load<WIDTH>(weight), firsts = load<WIDTH>(first), seconds = load<WIDTH>(second);
    Pack<float, WIDTH> gradients = load<WIDTH>(gradient);
    // All at once: a register less is needed in the divisions.
#pragma unroll
    for (int i = 0; i < WIDTH; i++) gradients.values[i] = __fmul_rn(gradients.values[i], step.scale);
#pragma unroll
    for (int i = 0; i < WIDTH; i++) {
        update(weights.values[i], gradients.values[i], firsts.values[i], seconds.values[i], step);
    }
    store(weight, weights);
    store(first, firsts);
    store(second, seconds);
}

extern "C" __global__ void __launch_bounds__(256) adamw(
    const unsigned long long* table, int chunk_values, const Verdict* verdict, float keep, float rate, float beta1_rest,
    float beta2, float beta2_rest, float correction, float epsilon
) {
    if (verdict->reaction != TAKE) return;
    const float scale = static_cast<float>(verdict->gradient_scale);
    const Step step = {scale, keep, rate, beta1_rest, beta2, beta2_rest, correction, epsilon};
    const unsigned long long* chunk = table + static_cast<long long>(blockIdx.x) * CHUNK_WORDS;
    float* weight = reinterpret_cast<float*>(chunk[0]);
    const float* gradient = reinterpret_cast<const float*>(chunk[1]);
    float* first = reinterpret_cast<float*>(chunk[2]);
    float* second = reinterpret_cast<float*>(chunk[3]);
    const int length = min(static_cast<int>(chunk[4]), chunk_values);
    const int wide = aligned(weight, gradient, first, second) ? length / 4 * 4 : 0;
    for (int at = threadIdx.x * 4; at < wide; at += blockDim.x * 4) {
        update_pack<4>(weight + at, gradient + at, first + at, second + at, step);
    }
    for (int at = wide + threadIdx.x; at < length; at += blockDim.x) {
        update_pack<1>(weight + at, gradient + at, first + at, second + at, step);
    }
}
