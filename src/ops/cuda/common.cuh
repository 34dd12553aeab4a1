// What every kernel file begins with: the number type of activations, wide memory accesses, reductions.
//
// The host puts this text before each file and compiles it with NVRTC, with `-DREAL=float` or `-DREAL=__nv_bfloat16`.
// All kernels keep to this:
// - activations are `real`, arithmetic is f32, and a result is rounded once, to the nearest even;
// - sums run in an order that depends on the shape alone: no atomics on floats;
// - NaN is passed on;
// - blocks have a multiple of 32 threads and at most 1024, all of which reach every reduction, in one direction or, where
//   the first is a single warp, in two: then a block's reductions are those of its warps;
// - indices within a row are `int`, offsets into a matrix `long long`.

#include <cuda_bf16.h>

#ifndef RETUNE_STAND_IN
// Memory of the block whose size the host chooses at the launch.
#define SHARED_MEMORY(type, name)                                   \
    extern __shared__ __align__(16) unsigned char shared_bytes[];   \
    type* name = reinterpret_cast<type*>(shared_bytes)
#endif

typedef REAL real;

inline constexpr int WARP = 32;
inline constexpr unsigned ALL_LANES = 0xffffffffu;
// Values of `real` in an access of 16 bytes, the widest there is.
inline constexpr int WIDE = 16 / sizeof(real);

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

// To the nearest value, ties to even.
template <typename To> __device__ __forceinline__ To narrow(float value);
template <> __device__ __forceinline__ float narrow<float>(float value) { return value; }
template <> __device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
    return __float2bfloat16(value);
}

// --- wide accesses ---

// `WIDTH` neighbours in memory, moved together, in as many accesses of 16 bytes as they need.
template <typename T, int WIDTH> struct __align__(WIDTH * sizeof(T) < 16 ? WIDTH * sizeof(T) : 16) Pack {
    T values[WIDTH];
};

template <int WIDTH, typename T> __device__ __forceinline__ Pack<T, WIDTH> load(const T* from) {
    return *reinterpret_cast<const Pack<T, WIDTH>*>(from);
}

template <int WIDTH, typename T> __device__ __forceinline__ void store(T* to, const Pack<T, WIDTH>& pack) {
    *reinterpret_cast<Pack<T, WIDTH>*>(to) = pack;
}

// Whether all of these begin at a multiple of 16 bytes. Null does.
template <typename... Pointers> __device__ __forceinline__ bool aligned(const Pointers*... pointers) {
    return ((reinterpret_cast<unsigned long long>(pointers) | ...) & 15) == 0;
}

// A number known when compiling, to be passed as an argument.
template <int VALUE> struct Constant {
    static constexpr int value = VALUE;
};

// Calls `Visit::at<WIDTH>(at, arguments…)` so that each of `n` values is seen by one thread of the grid: `at` is the
// first of `MOST` neighbours where the pointers are aligned (`wide`), and of one in what remains.
template <typename Visit, int MOST, typename... Arguments>
__device__ __forceinline__ void over_grid(long long n, bool wide, Arguments... arguments) {
    const long long thread = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    const long long threads = static_cast<long long>(gridDim.x) * blockDim.x;
    const long long packs = wide ? n / MOST : 0;
    for (long long pack = thread; pack < packs; pack += threads) Visit::template at<MOST>(pack * MOST, arguments...);
    for (long long at = packs * MOST + thread; at < n; at += threads) Visit::template at<1>(at, arguments...);
}

// --- reductions ---

struct Sum {
    template <typename T> __device__ __forceinline__ T operator()(T a, T b) const { return a + b; }
};

// NaN is passed over.
struct Largest {
    __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

struct Smallest {
    __device__ __forceinline__ unsigned operator()(unsigned a, unsigned b) const { return b < a ? b : a; }
};

// `join` over the values of a warp's lanes; every lane has the result. `join` must be commutative: then all lanes have
// the same bits.
template <typename T, typename Join> __device__ __forceinline__ T reduce_warp(T value, Join join) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        value = join(value, __shfl_xor_sync(ALL_LANES, value, distance));
    }
    return value;
}

// `join` over the values of a block's threads, `nothing` being what changes no value; every thread has the result.
template <typename T, typename Join> __device__ __forceinline__ T reduce_block(T value, T nothing, Join join) {
    __shared__ T warps[WARP];
    value = reduce_warp(value, join);
    if (blockDim.x == WARP) return value;
    const int lane = threadIdx.x % WARP;
    // The last reduction has been read by all before this one is written.
    __syncthreads();
    if (lane == 0) warps[threadIdx.x / WARP] = value;
    __syncthreads();
    return reduce_warp(lane < blockDim.x / WARP ? warps[lane] : nothing, join);
}

template <typename T> __device__ __forceinline__ T sum_warp(T value) { return reduce_warp(value, Sum()); }
template <typename T> __device__ __forceinline__ T sum_block(T value) { return reduce_block(value, T(0), Sum()); }
