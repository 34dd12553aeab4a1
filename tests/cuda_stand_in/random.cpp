// The stand-in's libcurand: good random numbers by the seed, though not those of a device.

#include <curand.h>

#include <cmath>
#include <random>

struct curandGenerator_st {
    std::mt19937_64 engine;
};

namespace {

// In (0, 1], as cuRAND draws.
double uniform(curandGenerator_t generator, int digits) {
    return std::ldexp(double((generator->engine() >> (64 - digits)) + 1), -digits);
}

template <typename Value>
curandStatus_t fill_uniform(curandGenerator_t generator, Value* values, size_t count, int digits) {
    if (!generator) return CURAND_STATUS_NOT_INITIALIZED;
    for (size_t index = 0; index < count; ++index) values[index] = Value(uniform(generator, digits));
    return CURAND_STATUS_SUCCESS;
}

template <typename Value>
curandStatus_t fill_normal(curandGenerator_t generator, Value* values, size_t count, double mean, double deviation) {
    if (!generator) return CURAND_STATUS_NOT_INITIALIZED;
    if (count % 2 != 0) return CURAND_STATUS_LENGTH_NOT_MULTIPLE;
    for (size_t index = 0; index < count; index += 2) {
        const double radius = std::sqrt(-2.0 * std::log(uniform(generator, 53)));
        const double angle = 2.0 * M_PI * uniform(generator, 53);
        values[index] = Value(mean + deviation * radius * std::cos(angle));
        values[index + 1] = Value(mean + deviation * radius * std::sin(angle));
    }
    return CURAND_STATUS_SUCCESS;
}

}  // namespace

extern "C" {

curandStatus_t curandCreateGenerator(curandGenerator_t* generator, curandRngType_t) {
    *generator = new curandGenerator_st;
    return CURAND_STATUS_SUCCESS;
}

curandStatus_t curandDestroyGenerator(curandGenerator_t generator) {
    delete generator;
    return CURAND_STATUS_SUCCESS;
}

curandStatus_t curandSetStream(curandGenerator_t, cudaStream_t) { return CURAND_STATUS_SUCCESS; }

curandStatus_t curandSetPseudoRandomGeneratorSeed(curandGenerator_t generator, unsigned long long seed) {
    if (!generator) return CURAND_STATUS_NOT_INITIALIZED;
    generator->engine.seed(seed);
    return CURAND_STATUS_SUCCESS;
}

curandStatus_t curandSetGeneratorOffset(curandGenerator_t generator, unsigned long long offset) {
    if (!generator) return CURAND_STATUS_NOT_INITIALIZED;
    generator->engine.discard(offset);
    return CURAND_STATUS_SUCCESS;
}

curandStatus_t curandGenerate(curandGenerator_t generator, unsigned* values, size_t count) {
    if (!generator) return CURAND_STATUS_NOT_INITIALIZED;
    for (size_t index = 0; index < count; ++index) values[index] = unsigned(generator->engine() >> 32);
    return CURAND_STATUS_SUCCESS;
}

curandStatus_t curandGenerateUniform(curandGenerator_t generator, float* values, size_t count) {
    return fill_uniform(generator, values, count, 24);
}

curandStatus_t curandGenerateUniformDouble(curandGenerator_t generator, double* values, size_t count) {
    return fill_uniform(generator, values, count, 53);
}

curandStatus_t curandGenerateNormal(curandGenerator_t generator, float* values, size_t count, float mean, float deviation) {
    return fill_normal(generator, values, count, double(mean), double(deviation));
}

curandStatus_t curandGenerateNormalDouble(curandGenerator_t generator, double* values, size_t count, double mean, double deviation) {
    return fill_normal(generator, values, count, mean, deviation);
}

}  // extern "C"
