// Checks the stand-in itself, through the interfaces that a program uses:
//
//     ./build.sh FOLDER
//     c++ -std=c++17 -I $CUDA_HOME/include check_stand_in.cpp FOLDER/*.so.* -o check
//     LD_LIBRARY_PATH=FOLDER ./check [PTX of candle...]
//
// It prints one line for each check and fails with the first that is wrong.

#include <cublas_v2.h>
#include <cuda.h>
#include <curand.h>
#include <nvrtc.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#define EXPECT(condition)                                                              \
    do {                                                                               \
        if (!(condition)) {                                                            \
            std::fprintf(stderr, "line %d: `%s` does not hold\n", __LINE__, #condition); \
            std::exit(1);                                                              \
        }                                                                              \
    } while (false)
#define OK(call) EXPECT((call) == 0)

namespace {

// Device memory with the values of a vector.
template <typename Value>
struct Buffer {
    CUdeviceptr pointer = 0;
    size_t count;
    explicit Buffer(const std::vector<Value>& values) : count(values.size()) {
        OK(cuMemAllocAsync(&pointer, count * sizeof(Value), nullptr));
        OK(cuMemcpyHtoDAsync(pointer, values.data(), count * sizeof(Value), nullptr));
    }
    ~Buffer() { OK(cuMemFreeAsync(pointer, nullptr)); }
    void* address() const { return reinterpret_cast<void*>(pointer); }
    std::vector<Value> values() const {
        std::vector<Value> read(count);
        OK(cuMemcpyDtoH(read.data(), pointer, count * sizeof(Value)));
        return read;
    }
};

uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float from_bf16(uint16_t value) {
    const uint32_t bits = uint32_t(value) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

std::vector<float> some_values(size_t count) {
    std::vector<float> values(count);
    for (size_t index = 0; index < count; ++index) values[index] = std::sin(float(index) * 0.7f + float(count)) * 3;
    return values;
}

// ---- kernels -----------------------------------------------------------------------------------------------------

const char sums_source[] = R"(
#include <cuda_bf16.h>
typedef REAL real;
__device__ __forceinline__ float warp_sum(float value) {
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffff, value, distance);
    return value;
}
// One block of WIDTH threads per row.
extern "C" __global__ void __launch_bounds__(WIDTH) row_sums(const real* __restrict__ x, float* sums, int columns) {
    __shared__ float warps[32];
    SHARED_MEMORY(float, own);
    float sum = 0;
    for (int column = threadIdx.x; column < columns; column += blockDim.x) sum += float(x[(long long)blockIdx.x * columns + column]);
    own[threadIdx.x] = sum;
    __syncthreads();
    sum = warp_sum(own[blockDim.x - 1 - threadIdx.x]);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        float total = 0;
        for (int warp = 0; warp < WIDTH / 32; ++warp) total += warps[warp];
        sums[blockIdx.x] = total;
    }
}
#define NARROW(name, type) extern "C" __global__ void name(const float* x, type* y, int n) { \
    const int i = blockIdx.x * blockDim.x + threadIdx.x; if (i < n) y[i] = type(x[i]); }
NARROW(narrow, real)
extern "C" __global__ void lanes(int* out) {
    extern __shared__ int raw[];
    int all[32];
    const int mine = threadIdx.x * 3;
    stand_in_exchange(&mine, sizeof mine, all);
    raw[threadIdx.x] = all[(threadIdx.x + 1) % 32];
    __syncwarp();
    out[threadIdx.x] = raw[31 - threadIdx.x] + __shfl_down_sync(0xffffffff, mine, 1) * 1000 + __popc(__ballot_sync(0xffffffff, mine > 30)) * 1000000;
}
extern "C" __global__ void beyond(float* x, int n) { x[n + threadIdx.x] = 1; }
)";

CUmodule compile(const char* source, const std::vector<const char*>& options) {
    nvrtcProgram program;
    OK(nvrtcCreateProgram(&program, source, "check.cu", 0, nullptr, nullptr));
    if (nvrtcCompileProgram(program, int(options.size()), options.data()) != NVRTC_SUCCESS) {
        size_t size;
        OK(nvrtcGetProgramLogSize(program, &size));
        std::string log(size, ' ');
        OK(nvrtcGetProgramLog(program, log.data()));
        std::fprintf(stderr, "%s", log.c_str());
        std::exit(1);
    }
    size_t size;
    OK(nvrtcGetPTXSize(program, &size));
    std::string code(size, ' ');
    OK(nvrtcGetPTX(program, code.data()));
    OK(nvrtcDestroyProgram(&program));
    CUmodule module;
    OK(cuModuleLoadData(&module, code.c_str()));
    return module;
}

CUfunction function(CUmodule module, const char* name) {
    CUfunction found;
    OK(cuModuleGetFunction(&found, module, name));
    return found;
}

template <typename... Arguments>
void launch(CUfunction kernel, unsigned blocks, unsigned threads, unsigned shared_bytes, Arguments... arguments) {
    void* parameters[] = {static_cast<void*>(&arguments)...};
    OK(cuLaunchKernel(kernel, blocks, 1, 1, threads, 1, 1, shared_bytes, nullptr, parameters, nullptr));
}

void check_kernels() {
    const int rows = 5, columns = 777;
    const std::vector<float> values = some_values(size_t(rows) * columns);
    const Buffer<float> wide(values);
    const Buffer<float> sums(std::vector<float>(rows, NAN));
    const CUmodule floats = compile(sums_source, {"--std=c++17", "--gpu-architecture=compute_80", "-DREAL=float", "-D", "WIDTH=256"});
    launch(function(floats, "row_sums"), rows, 256, 256 * 4, wide.pointer, sums.pointer, columns);
    const CUmodule bf16 = compile(sums_source, {"--define-macro=REAL=__nv_bfloat16", "-DWIDTH=128", "-I/nowhere"});
    const Buffer<uint16_t> narrow(std::vector<uint16_t>(values.size()));
    launch(function(bf16, "narrow"), (rows * columns + 127) / 128, 128, 0, wide.pointer, narrow.pointer, rows * columns);
    const Buffer<float> narrow_sums(std::vector<float>(rows, NAN));
    launch(function(bf16, "row_sums"), rows, 128, 128 * 4, narrow.pointer, narrow_sums.pointer, columns);
    const std::vector<uint16_t> narrowed = narrow.values();
    for (int row = 0; row < rows; ++row) {
        double sum = 0, narrow_sum = 0;
        for (int column = 0; column < columns; ++column) {
            const size_t index = size_t(row * columns + column);
            sum += values[index];
            narrow_sum += from_bf16(narrowed[index]);
            EXPECT(narrowed[index] == to_bf16(values[index]));
        }
        EXPECT(std::fabs(sums.values()[size_t(row)] - sum) < 1e-3);
        EXPECT(std::fabs(narrow_sums.values()[size_t(row)] - narrow_sum) < 1e-3);
    }
    const Buffer<int> lanes(std::vector<int>(32));
    launch(function(floats, "lanes"), 1, 32, 128, lanes.pointer);
    for (int lane = 0; lane < 32; ++lane) {
        EXPECT(lanes.values()[size_t(lane)] == (31 - lane + 1) % 32 * 3 + std::min(lane + 1, 31) * 3000 + 21000000);
    }
    CUfunction none;
    EXPECT(cuModuleGetFunction(&none, floats, "nobody") == CUDA_ERROR_NOT_FOUND);
    void* parameters[] = {nullptr};
    EXPECT(cuLaunchKernel(function(floats, "lanes"), 1, 1, 1, 32, 1, 1, 50000, nullptr, parameters, nullptr) == CUDA_ERROR_INVALID_VALUE);
    nvrtcProgram wrong;
    OK(nvrtcCreateProgram(&wrong, "extern \"C\" __global__ void wrong() { nothing; }", "wrong.cu", 0, nullptr, nullptr));
    EXPECT(nvrtcCompileProgram(wrong, 0, nullptr) == NVRTC_ERROR_COMPILATION);
    size_t size;
    OK(nvrtcGetProgramLogSize(wrong, &size));
    EXPECT(size > 20);
    if (std::getenv("CHECK_BEYOND")) launch(function(floats, "beyond"), 1, 32, 0, wide.pointer, rows * columns);
    std::puts("kernels: shared memory, shuffles, exchange, bf16, errors");
}

// ---- products ----------------------------------------------------------------------------------------------------

void check_products() {
    cublasHandle_t handle;
    OK(cublasCreate(&handle));
    OK(cublasSetStream(handle, nullptr));
    OK(cublasSetMathMode(handle, CUBLAS_PEDANTIC_MATH));
    const int m = 7, n = 5, k = 11, batch = 3;
    for (int bits = 0; bits < 16; ++bits) {
        const bool a_transposed = bits & 1, b_transposed = bits & 2, narrow = bits & 4, add = bits & 8;
        const int lda = (a_transposed ? k : m) + 2, ldb = (b_transposed ? n : k) + 1, ldc = m + 3;
        const long long a_stride = lda * (a_transposed ? m : k) + 4, b_stride = ldb * (b_transposed ? k : n), c_stride = ldc * n + 1;
        std::vector<float> a = some_values(size_t(a_stride * batch)), b = some_values(size_t(b_stride * batch));
        std::vector<uint16_t> a_narrow, b_narrow;
        for (float& value : a) a_narrow.push_back(to_bf16(value));
        for (float& value : b) b_narrow.push_back(to_bf16(value));
        if (narrow) {
            for (size_t index = 0; index < a.size(); ++index) a[index] = from_bf16(a_narrow[index]);
            for (size_t index = 0; index < b.size(); ++index) b[index] = from_bf16(b_narrow[index]);
        }
        const std::vector<float> before = some_values(size_t(c_stride * batch));
        const Buffer<float> a_wide_memory(a), b_wide_memory(b), c(add ? before : std::vector<float>(before.size(), NAN));
        const Buffer<uint16_t> a_memory(a_narrow), b_memory(b_narrow);
        const float alpha = 0.5f, beta = add ? 2.0f : 0.0f;
        const cudaDataType type = narrow ? CUDA_R_16BF : CUDA_R_32F;
        OK(cublasGemmStridedBatchedEx(handle, a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N, b_transposed ? CUBLAS_OP_T : CUBLAS_OP_N, m, n, k,
                                      &alpha, narrow ? a_memory.address() : a_wide_memory.address(), type, lda, a_stride,
                                      narrow ? b_memory.address() : b_wide_memory.address(), type, ldb, b_stride, &beta, c.address(),
                                      CUDA_R_32F, ldc, c_stride, batch, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
        const std::vector<float> got = c.values();
        for (int element = 0; element < batch; ++element) {
            for (int i = 0; i < m; ++i) {
                for (int j = 0; j < n; ++j) {
                    double sum = 0;
                    for (int inner = 0; inner < k; ++inner) {
                        const long long a_index = element * a_stride + (a_transposed ? inner + i * lda : i + inner * lda);
                        const long long b_index = element * b_stride + (b_transposed ? j + inner * ldb : inner + j * ldb);
                        sum += double(a[size_t(a_index)]) * b[size_t(b_index)];
                    }
                    const size_t index = size_t(element * c_stride + i + j * ldc);
                    EXPECT(std::fabs(got[index] - (0.5 * sum + (add ? 2.0 * before[index] : 0.0))) < 1e-4);
                }
            }
        }
        // Without strides, and with a result of the factors' type.
        const Buffer<uint16_t> c_narrow(std::vector<uint16_t>(size_t(ldc * n)));
        if (narrow && !add) {
            OK(cublasGemmEx(handle, a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N, b_transposed ? CUBLAS_OP_T : CUBLAS_OP_N, m, n, k, &alpha,
                            a_memory.address(), type, lda, b_memory.address(), type, ldb, &beta, c_narrow.address(), type, ldc,
                            CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
            EXPECT(c_narrow.values()[size_t(3 + 2 * ldc)] == to_bf16(got[size_t(3 + 2 * ldc)]));
            EXPECT(cublasGemmEx(handle, CUBLAS_OP_N, CUBLAS_OP_N, m, n, k, &alpha, a_memory.address(), type, m, b_wide_memory.address(),
                                CUDA_R_32F, k, &beta, c.address(), CUDA_R_32F, m, CUBLAS_COMPUTE_32F,
                                CUBLAS_GEMM_DEFAULT) == CUBLAS_STATUS_NOT_SUPPORTED);
            EXPECT(cublasGemmEx(handle, CUBLAS_OP_N, CUBLAS_OP_N, m, 5000, k, &alpha, a_memory.address(), type, m, b_memory.address(), type,
                                k, &beta, c.address(), CUDA_R_32F, m, CUBLAS_COMPUTE_32F,
                                CUBLAS_GEMM_DEFAULT) == CUBLAS_STATUS_EXECUTION_FAILED);
            EXPECT(cublasGemmEx(handle, CUBLAS_OP_N, CUBLAS_OP_N, m, n, k, &alpha, a_memory.address(), type, m - 1, b_memory.address(), type,
                                k, &beta, c.address(), CUDA_R_32F, m, CUBLAS_COMPUTE_32F,
                                CUBLAS_GEMM_DEFAULT) == CUBLAS_STATUS_INVALID_VALUE);
        }
    }
    OK(cublasDestroy(handle));
    std::puts("products: all transpositions, f32 and bf16, strides, alpha and beta, refusals");
}

// ---- memory, time, random numbers --------------------------------------------------------------------------------

void check_driver() {
    size_t available, total, after;
    OK(cuMemGetInfo(&available, &total));
    CUdeviceptr pointer;
    EXPECT(cuMemAlloc(&pointer, total + 1) == CUDA_ERROR_OUT_OF_MEMORY);
    OK(cuMemAlloc(&pointer, 4096));
    OK(cuMemGetInfo(&after, &total));
    EXPECT(available - after == 4096);
    std::vector<unsigned char> host(4097);
    EXPECT(cuMemcpyDtoH(host.data(), pointer, 4097) == CUDA_ERROR_INVALID_VALUE);
    OK(cuMemsetD8Async(pointer, 7, 4096, nullptr));
    OK(cuMemcpyDtoH(host.data(), pointer, 4096));
    EXPECT(host[0] == 7 && host[4095] == 7);
    OK(cuMemFree(pointer));
    EXPECT(cuMemFree(pointer) == CUDA_ERROR_INVALID_VALUE);
    CUevent start, end;
    float milliseconds = -1;
    OK(cuEventCreate(&start, 0));
    OK(cuEventCreate(&end, 0));
    OK(cuEventRecord(start, nullptr));
    OK(cuEventRecord(end, nullptr));
    OK(cuEventElapsedTime(&milliseconds, start, end));
    EXPECT(milliseconds >= 0);
    void* locked;
    OK(cuMemHostAlloc(&locked, 16, 0));
    OK(cuMemAlloc(&pointer, 16));
    std::memset(locked, 1, 16);
    OK(cuMemcpyHtoDAsync(pointer, locked, 16, nullptr));
    OK(cuEventRecord(end, nullptr));
    std::memset(locked, 2, 16);
    EXPECT(cuEventQuery(end) == CUDA_ERROR_NOT_READY);
    OK(cuEventQuery(end));
    std::memset(locked, 3, 16);
    OK(cuMemcpyDtoH(host.data(), pointer, 16));
    EXPECT(host[0] == 2);
    OK(cuMemFree(pointer));
    OK(cuMemFreeHost(locked));
    EXPECT(cuMemHostAlloc(&locked, 16, 8) == CUDA_ERROR_INVALID_VALUE);
    OK(cuEventDestroy(start));
    OK(cuEventDestroy(end));
    CUgraph graph;
    EXPECT(cuGraphCreate(&graph, 0) == CUDA_ERROR_NOT_SUPPORTED);
    curandGenerator_t generator;
    OK(curandCreateGenerator(&generator, CURAND_RNG_PSEUDO_DEFAULT));
    OK(curandSetPseudoRandomGeneratorSeed(generator, 3));
    const size_t count = 100000;
    const Buffer<float> numbers((std::vector<float>(count)));
    OK(curandGenerateNormal(generator, static_cast<float*>(numbers.address()), count, 1, 2));
    double sum = 0, squares = 0;
    for (float value : numbers.values()) sum += value, squares += (value - 1) * (value - 1);
    EXPECT(std::fabs(sum / count - 1) < 0.03 && std::fabs(squares / count - 4) < 0.1);
    OK(curandDestroyGenerator(generator));
    std::puts("driver: memory and its limit, page-locked memory, events, refusals, random numbers");
}

// ---- candle ------------------------------------------------------------------------------------------------------

// Loads the PTX that candle embeds, and runs a kernel of it that is known here.
void check_candle(const char* path) {
    std::ifstream file(path);
    const std::string ptx{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    CUmodule module;
    OK(cuModuleLoadData(&module, ptx.c_str()));
    size_t entries = 0;
    for (size_t at = ptx.find(".entry "); at != std::string::npos; at = ptx.find(".entry ", at + 1)) {
        const size_t first = at + 7;
        function(module, ptx.substr(first, ptx.find_first_of("( \n", first) - first).c_str());
        ++entries;
    }
    const std::vector<float> values = some_values(1000);
    const Buffer<float> x(values), y(std::vector<float>(1000, NAN));
    const Buffer<uint16_t> narrow(std::vector<uint16_t>(1000));
    const size_t count = 1000, dimensions = 1;
    const CUdeviceptr none = 0;
    if (ptx.find(".entry affine_f32(") != std::string::npos) {
        launch(function(module, "affine_f32"), 8, 128, 0, count, dimensions, none, x.pointer, y.pointer, 2.0f, 0.25f);
        for (size_t index = 0; index < count; ++index) EXPECT(y.values()[index] == values[index] * 2.0f + 0.25f);
    }
    if (ptx.find(".entry cast_f32_bf16(") != std::string::npos) {
        launch(function(module, "cast_f32_bf16"), 8, 128, 0, count, dimensions, none, x.pointer, narrow.pointer);
        launch(function(module, "cast_bf16_f32"), 8, 128, 0, count, dimensions, none, narrow.pointer, y.pointer);
        for (size_t index = 0; index < count; ++index) EXPECT(y.values()[index] == from_bf16(to_bf16(values[index])));
    }
    if (ptx.find(".entry usilu_f32(") != std::string::npos) {
        launch(function(module, "usilu_f32"), 8, 128, 0, count, dimensions, none, x.pointer, y.pointer);
        for (size_t index = 0; index < count; ++index) {
            EXPECT(std::fabs(y.values()[index] - values[index] / (1 + std::exp(-values[index]))) < 1e-6);
        }
    }
    if (ptx.find(".entry fast_sum_f32(") != std::string::npos) {
        const std::vector<size_t> shape = {10, 100, 100, 1};
        const Buffer<size_t> information(shape);
        const size_t two = 2, per_block = 100;
        launch(function(module, "fast_sum_f32"), 10, 64, 0, count, per_block, two, information.pointer, x.pointer, y.pointer);
        double sum = 0;
        for (size_t index = 300; index < 400; ++index) sum += values[index];
        EXPECT(std::fabs(y.values()[3] - sum) < 1e-3);
    }
    OK(cuModuleUnload(module));
    std::printf("candle: %zu kernels of %s\n", entries, path);
}

}  // namespace

int main(int count, char** arguments) {
    OK(cuInit(0));
    CUdevice device;
    OK(cuDeviceGet(&device, 0));
    CUdeviceptr pointer;
    EXPECT(cuMemAlloc(&pointer, 1) == CUDA_ERROR_INVALID_CONTEXT);
    CUcontext context;
    OK(cuDevicePrimaryCtxRetain(&context, device));
    OK(cuCtxSetCurrent(context));
    check_driver();
    check_kernels();
    check_products();
    for (int index = 1; index < count; ++index) check_candle(arguments[index]);
    OK(cuDevicePrimaryCtxRelease(device));
}
