// The stand-in's libcublas: matrix products, column-major as in cuBLAS, summed in f32 (f64 for doubles) in the order of the
// inner dimension. With the math mode or compute type of TF32, f32 factors are rounded to TF32 first, as on a device.

#include <cublas_v2.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

// Narrow floats and nothing else of CUDA C++: its types would clash with those of the toolkit's headers.
#include "bits.h"

extern "C" bool cuStandInInside(const void* address, size_t bytes, const char* call);

struct cublasContext {
    cudaStream_t stream = nullptr;
    cublasPointerMode_t pointer_mode = CUBLAS_POINTER_MODE_HOST;
    cublasAtomicsMode_t atomics_mode = CUBLAS_ATOMICS_NOT_ALLOWED;
    cublasMath_t math_mode = CUBLAS_DEFAULT_MATH;
};

namespace {

__attribute__((format(printf, 2, 3))) cublasStatus_t refuse(cublasStatus_t status, const char* format, ...) {
    std::fprintf(stderr, "cuda stand-in: ");
    va_list arguments;
    va_start(arguments, format);
    std::vfprintf(stderr, format, arguments);
    va_end(arguments);
    std::fprintf(stderr, "\n");
    return status;
}

size_t size_of(cudaDataType type) {
    switch (type) {
        case CUDA_R_64F: return 8;
        case CUDA_R_32F: return 4;
        case CUDA_R_16F:
        case CUDA_R_16BF: return 2;
        default: return 0;
    }
}

double read(const void* values, size_t index, cudaDataType type) {
    switch (type) {
        case CUDA_R_64F: return static_cast<const double*>(values)[index];
        case CUDA_R_32F: return static_cast<const float*>(values)[index];
        case CUDA_R_16F: return stand_in::HalfFormat::widen(static_cast<const uint16_t*>(values)[index]);
        default: return stand_in::BrainFormat::widen(static_cast<const uint16_t*>(values)[index]);
    }
}

void write(void* values, size_t index, cudaDataType type, double value) {
    switch (type) {
        case CUDA_R_64F: static_cast<double*>(values)[index] = value; break;
        case CUDA_R_32F: static_cast<float*>(values)[index] = float(value); break;
        case CUDA_R_16F: static_cast<uint16_t*>(values)[index] = stand_in::HalfFormat::narrow(value); break;
        default: static_cast<uint16_t*>(values)[index] = stand_in::BrainFormat::narrow(value);
    }
}

// Ten bits of mantissa instead of 23.
float to_tf32(float value) {
    if (value != value || std::isinf(value)) return value;
    uint32_t bits = stand_in::bits<uint32_t>(value);
    bits += 0x0fff + (bits >> 13 & 1);
    return stand_in::bits<float>(bits & ~0x1fffu);
}

struct Operand {
    const void* values;
    cudaDataType type;
    int64_t leading;
    long long stride;
    cublasOperation_t operation;
};

struct Product {
    const char* call;
    int m, n, k;
    double alpha, beta;
    Operand a, b;
    void* c;
    cudaDataType c_type;
    int64_t c_leading;
    long long c_stride;
    int batch;
    bool tf32;
};

bool is_plain(const Operand& operand) { return operand.operation == CUBLAS_OP_N; }

// A matrix of `rows` x `columns` in memory, checked against what is allocated.
bool reaches(const Product& product, const void* values, cudaDataType type, int rows, int columns, int64_t leading, long long stride) {
    if (rows == 0 || columns == 0) return true;
    const size_t bytes = (size_t(columns - 1) * size_t(leading) + size_t(rows)) * size_of(type);
    for (int batch : {0, product.batch - 1}) {
        const char* first = static_cast<const char*>(values) + batch * stride * static_cast<long long>(size_of(type));
        if (!cuStandInInside(first, bytes, product.call)) return false;
    }
    return true;
}

// The values of op(operand), which is `outer` x k, one row of `outer` values for each of the k.
template <typename Sum>
std::vector<Sum> gather(const Operand& operand, long long offset, int outer, int k, bool outer_is_contiguous, bool tf32) {
    std::vector<Sum> values(size_t(outer) * size_t(k));
    for (int inner = 0; inner < k; ++inner) {
        for (int position = 0; position < outer; ++position) {
            const int64_t index = outer_is_contiguous ? position + inner * operand.leading : inner + position * operand.leading;
            Sum value = Sum(read(operand.values, size_t(offset + index), operand.type));
            if (tf32) value = Sum(to_tf32(float(value)));
            values[size_t(inner) * size_t(outer) + size_t(position)] = value;
        }
    }
    return values;
}

// C = alpha op(A) op(B) + beta C, where C is m x n.
template <typename Sum>
void multiply(const Product& product) {
    std::vector<Sum> column(static_cast<size_t>(product.m));
    for (int batch = 0; batch < product.batch; ++batch) {
        const std::vector<Sum> a = gather<Sum>(product.a, batch * product.a.stride, product.m, product.k, is_plain(product.a), product.tf32);
        const std::vector<Sum> b = gather<Sum>(product.b, batch * product.b.stride, product.n, product.k, !is_plain(product.b), product.tf32);
        for (int j = 0; j < product.n; ++j) {
            std::fill(column.begin(), column.end(), Sum(0));
            for (int inner = 0; inner < product.k; ++inner) {
                const Sum factor = b[size_t(inner) * size_t(product.n) + size_t(j)];
                const Sum* row = a.data() + size_t(inner) * size_t(product.m);
                for (int i = 0; i < product.m; ++i) column[size_t(i)] += row[i] * factor;
            }
            for (int i = 0; i < product.m; ++i) {
                const size_t index = size_t(batch * product.c_stride + j * product.c_leading + i);
                Sum value = Sum(product.alpha) * column[size_t(i)];
                // With beta 0 the result is not read, so what is there may be anything.
                if (product.beta != 0) value += Sum(product.beta) * Sum(read(product.c, index, product.c_type));
                write(product.c, index, product.c_type, double(value));
            }
        }
    }
}

cublasStatus_t run(const Product& product) {
    const Operand &a = product.a, &b = product.b;
    if (product.m < 0 || product.n < 0 || product.k < 0 || product.batch < 0) {
        return refuse(CUBLAS_STATUS_INVALID_VALUE, "`%s`: a negative size", product.call);
    }
    const int a_rows = is_plain(a) ? product.m : product.k, a_columns = is_plain(a) ? product.k : product.m;
    const int b_rows = is_plain(b) ? product.k : product.n, b_columns = is_plain(b) ? product.n : product.k;
    if (a.leading < std::max(1, a_rows) || b.leading < std::max(1, b_rows) || product.c_leading < std::max(1, product.m)) {
        return refuse(CUBLAS_STATUS_INVALID_VALUE, "`%s`: leading dimensions %ld, %ld, %ld for columns of %d, %d, %d", product.call,
                      long(a.leading), long(b.leading), long(product.c_leading), a_rows, b_rows, product.m);
    }
    // What cuBLAS multiplies: factors of one type, and a result of that type or of f32.
    const bool same = product.c_type == a.type, wide = product.c_type == CUDA_R_32F && size_of(a.type) == 2;
    if (a.type != b.type || size_of(a.type) == 0 || !(same || wide)) {
        return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "`%s`: types %d, %d and %d", product.call, a.type, b.type, product.c_type);
    }
    if (product.m == 0 || product.n == 0 || product.batch == 0) return CUBLAS_STATUS_SUCCESS;
    if (!reaches(product, a.values, a.type, a_rows, a_columns, a.leading, a.stride) ||
        !reaches(product, b.values, b.type, b_rows, b_columns, b.leading, b.stride) ||
        !reaches(product, product.c, product.c_type, product.m, product.n, product.c_leading, product.c_stride)) {
        return CUBLAS_STATUS_EXECUTION_FAILED;
    }
    if (a.type == CUDA_R_64F) {
        multiply<double>(product);
    } else {
        multiply<float>(product);
    }
    return CUBLAS_STATUS_SUCCESS;
}

// `alpha` and `beta` are of the compute type.
bool scalar(const void* value, cublasComputeType_t compute, double* read_value) {
    switch (compute) {
        case CUBLAS_COMPUTE_16F:
        case CUBLAS_COMPUTE_16F_PEDANTIC: *read_value = read(value, 0, CUDA_R_16F); return true;
        case CUBLAS_COMPUTE_32F:
        case CUBLAS_COMPUTE_32F_PEDANTIC:
        case CUBLAS_COMPUTE_32F_FAST_16F:
        case CUBLAS_COMPUTE_32F_FAST_16BF:
        case CUBLAS_COMPUTE_32F_FAST_TF32: *read_value = read(value, 0, CUDA_R_32F); return true;
        case CUBLAS_COMPUTE_64F:
        case CUBLAS_COMPUTE_64F_PEDANTIC: *read_value = read(value, 0, CUDA_R_64F); return true;
        default: return false;
    }
}

cublasStatus_t gemm(const char* call, cublasHandle_t handle, cublasOperation_t a_operation, cublasOperation_t b_operation, int m, int n,
                    int k, const void* alpha, const void* a, cudaDataType a_type, int64_t a_leading, long long a_stride, const void* b,
                    cudaDataType b_type, int64_t b_leading, long long b_stride, const void* beta, void* c, cudaDataType c_type,
                    int64_t c_leading, long long c_stride, int batch, cublasComputeType_t compute) {
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    Product product{};
    if (!scalar(alpha, compute, &product.alpha) || !scalar(beta, compute, &product.beta)) {
        return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "`%s`: compute type %d", call, compute);
    }
    product.call = call;
    product.m = m;
    product.n = n;
    product.k = k;
    product.a = {a, a_type, a_leading, a_stride, a_operation};
    product.b = {b, b_type, b_leading, b_stride, b_operation};
    product.c = c;
    product.c_type = c_type;
    product.c_leading = c_leading;
    product.c_stride = c_stride;
    product.batch = batch;
    const bool allowed = compute == CUBLAS_COMPUTE_32F && (handle->math_mode & 0xf) == CUBLAS_TF32_TENSOR_OP_MATH;
    product.tf32 = a_type == CUDA_R_32F && (allowed || compute == CUBLAS_COMPUTE_32F_FAST_TF32);
    return run(product);
}

}  // namespace

extern "C" {

const char* cublasGetStatusName(cublasStatus_t status) {
    switch (status) {
        case CUBLAS_STATUS_SUCCESS: return "CUBLAS_STATUS_SUCCESS";
        case CUBLAS_STATUS_NOT_INITIALIZED: return "CUBLAS_STATUS_NOT_INITIALIZED";
        case CUBLAS_STATUS_INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
        case CUBLAS_STATUS_EXECUTION_FAILED: return "CUBLAS_STATUS_EXECUTION_FAILED";
        case CUBLAS_STATUS_NOT_SUPPORTED: return "CUBLAS_STATUS_NOT_SUPPORTED";
        default: return "a status that the stand-in never gives";
    }
}

const char* cublasGetStatusString(cublasStatus_t status) { return cublasGetStatusName(status); }

cublasStatus_t cublasCreate_v2(cublasHandle_t* handle) {
    *handle = new cublasContext;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasDestroy_v2(cublasHandle_t handle) {
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetVersion_v2(cublasHandle_t, int* version) {
    *version = 130000;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) {
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    handle->stream = stream;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetStream_v2(cublasHandle_t handle, cudaStream_t* stream) {
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    *stream = handle->stream;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t handle, void* workspace, size_t bytes) {
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (bytes > 0 && !cuStandInInside(workspace, bytes, "cublasSetWorkspace")) return CUBLAS_STATUS_INVALID_VALUE;
    return reinterpret_cast<uintptr_t>(workspace) % 256 == 0 ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode) {
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    handle->math_mode = mode;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t* mode) {
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    *mode = handle->math_mode;
    return CUBLAS_STATUS_SUCCESS;
}

// Scalars are read at once in both modes, since device memory is the computer's own.
cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t mode) {
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    handle->pointer_mode = mode;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t* mode) {
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    *mode = handle->pointer_mode;
    return CUBLAS_STATUS_SUCCESS;
}

// Without meaning here: nothing is added up by atomic operations.
cublasStatus_t cublasSetAtomicsMode(cublasHandle_t handle, cublasAtomicsMode_t mode) {
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    handle->atomics_mode = mode;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t a_operation, cublasOperation_t b_operation, int m, int n, int k,
                            const void* alpha, const void* a, cudaDataType a_type, int lda, const void* b, cudaDataType b_type, int ldb,
                            const void* beta, void* c, cudaDataType c_type, int ldc, cublasComputeType_t compute, cublasGemmAlgo_t) {
    return gemm("cublasGemmEx", handle, a_operation, b_operation, m, n, k, alpha, a, a_type, lda, 0, b, b_type, ldb, 0, beta, c, c_type,
                ldc, 0, 1, compute);
}

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t a_operation, cublasOperation_t b_operation, int m, int n,
                                          int k, const void* alpha, const void* a, cudaDataType a_type, int lda, long long a_stride,
                                          const void* b, cudaDataType b_type, int ldb, long long b_stride, const void* beta, void* c,
                                          cudaDataType c_type, int ldc, long long c_stride, int batch, cublasComputeType_t compute,
                                          cublasGemmAlgo_t) {
    return gemm("cublasGemmStridedBatchedEx", handle, a_operation, b_operation, m, n, k, alpha, a, a_type, lda, a_stride, b, b_type, ldb,
                b_stride, beta, c, c_type, ldc, c_stride, batch, compute);
}

#define STAND_IN_GEMM(letter, type, data, compute)                                                                                       \
    cublasStatus_t cublas##letter##gemm_v2(cublasHandle_t handle, cublasOperation_t a_operation, cublasOperation_t b_operation, int m,   \
                                           int n, int k, const type* alpha, const type* a, int lda, const type* b, int ldb,              \
                                           const type* beta, type* c, int ldc) {                                                         \
        return gemm("cublas" #letter "gemm", handle, a_operation, b_operation, m, n, k, alpha, a, data, lda, 0, b, data, ldb, 0, beta,   \
                    c, data, ldc, 0, 1, compute);                                                                                        \
    }                                                                                                                                    \
    cublasStatus_t cublas##letter##gemmStridedBatched(cublasHandle_t handle, cublasOperation_t a_operation,                              \
                                                      cublasOperation_t b_operation, int m, int n, int k, const type* alpha,             \
                                                      const type* a, int lda, long long a_stride, const type* b, int ldb,                \
                                                      long long b_stride, const type* beta, type* c, int ldc, long long c_stride,        \
                                                      int batch) {                                                                       \
        return gemm("cublas" #letter "gemmStridedBatched", handle, a_operation, b_operation, m, n, k, alpha, a, data, lda, a_stride, b,  \
                    data, ldb, b_stride, beta, c, data, ldc, c_stride, batch, compute);                                                  \
    }
STAND_IN_GEMM(S, float, CUDA_R_32F, CUBLAS_COMPUTE_32F)
STAND_IN_GEMM(D, double, CUDA_R_64F, CUBLAS_COMPUTE_64F)
#undef STAND_IN_GEMM

}  // extern "C"
