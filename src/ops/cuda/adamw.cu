// The AdamW step of all weights in one launch: `adamw.rs`, with the same roundings in the same order, so nothing here
// may be contracted.
//
// Weights, gradients and moments are f32. They are cut into chunks; the table has six words for each chunk:
//     address of its weights, of their gradient, of the first moment, of the second moment; number of values; 0
// Grid: chunks, blocks of 256 threads. `chunk_values` is the most values that a chunk has. No dynamic shared memory.

constexpr int CHUNK_WORDS = 6;

// The numbers of the step, as `adamw.rs` makes them.
struct Step {
    float scale, keep, rate, beta1_rest, beta2, beta2_rest, correction, epsilon;
};

__device__ __forceinline__ void update(float& weight, float gradient, float& first, float& second, const Step& step) {
    gradient = __fmul_rn(gradient, step.scale);
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
    const Pack<float, WIDTH> gradients = load<WIDTH>(gradient);
#pragma unroll
    for (int i = 0; i < WIDTH; i++) {
        update(weights.values[i], gradients.values[i], firsts.values[i], seconds.values[i], step);
    }
    store(weight, weights);
    store(first, firsts);
    store(second, seconds);
}

extern "C" __global__ void __launch_bounds__(256) adamw(
    const unsigned long long* table, int chunk_values, float scale, float keep, float rate, float beta1_rest,
    float beta2, float beta2_rest, float correction, float epsilon
) {
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
