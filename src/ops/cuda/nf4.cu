// Widens weights in NF4, 4-bit NormalFloat (QLoRA, Dettmers et al. 2023): 64 values share a magnitude, and each is one of
// sixteen levels times it. `src/ops/nf4.rs` makes the codes.
//
// Launch: blocks of 256 threads, as many as there are words of eight codes for them or fewer, for each thread goes on until
// all is done.

__device__ const float LEVELS[16] = {
    -1.0f,         -0.6961928f, -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f, -0.091050036f, 0.0f,
    0.0795803f,    0.1609302f,  0.2461123f,   0.33791524f, 0.44070983f,  0.562617f,    0.72295684f,   1.0f,
};

// Codes in a word: the first is in its lowest bits.
inline constexpr int WORD_CODES = 8;
// Words whose values share a magnitude.
inline constexpr int BLOCK_WORDS = 8;

// `values`, which begin at a multiple of 16 bytes, are `n`; of `codes` there is a word for each eight of them, of `largest` a
// magnitude for each 64.
extern "C" __global__ void __launch_bounds__(256)
widen_nf4(const unsigned* __restrict__ codes, const float* __restrict__ largest, real* values, long long n) {
    // Threads of a warp look up different levels at a time: sixteen words of shared memory are in as many banks.
    __shared__ float levels[16];
    if (threadIdx.x < 16) levels[threadIdx.x] = LEVELS[threadIdx.x];
    __syncthreads();
    const long long words = (n + WORD_CODES - 1) / WORD_CODES;
    const long long threads = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long word = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; word < words; word += threads) {
        const unsigned packed = codes[word];
        const float magnitude = largest[word / BLOCK_WORDS];
        const long long first = word * WORD_CODES;
        Pack<real, WORD_CODES> wide;
#pragma unroll
        for (int i = 0; i < WORD_CODES; i++) wide.values[i] = narrow<real>(levels[packed >> 4 * i & 15] * magnitude);
        if (first + WORD_CODES <= n) {
            store(values + first, wide);
        } else {
#pragma unroll
            for (int i = 0; i < WORD_CODES; i++) {
                if (first + i < n) values[first + i] = wide.values[i];
            }
        }
    }
}
