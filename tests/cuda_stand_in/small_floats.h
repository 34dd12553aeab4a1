// The narrow floats of CUDA on a CPU: `__half`, `__nv_bfloat16` and `__nv_fp8_e4m3`. Arithmetic rounds each result once, to
// the nearest value, ties to even. Part of `stand_in.h`.

#pragma once

#include "bits.h"

namespace stand_in {

// A 16-bit float. Sums, products, quotients and roots of two such values are rounded to float on the way, which has more
// than twice as many digits, so the second rounding gives the same as one.
template <typename Format>
struct SmallFloat {
    uint16_t raw;

    SmallFloat() = default;
    SmallFloat(float value) : raw(Format::narrow(value)) {}
    SmallFloat(double value) : raw(Format::narrow(value)) {}
#define STAND_IN_FROM(type) SmallFloat(type value) : raw(Format::narrow(double(value))) {}
    STAND_IN_FROM(short)
    STAND_IN_FROM(unsigned short)
    STAND_IN_FROM(int)
    STAND_IN_FROM(unsigned)
    STAND_IN_FROM(long)
    STAND_IN_FROM(unsigned long)
    STAND_IN_FROM(long long)
    STAND_IN_FROM(unsigned long long)
#undef STAND_IN_FROM
    template <typename Other, typename = std::enable_if_t<!std::is_same<Other, Format>::value>>
    explicit SmallFloat(SmallFloat<Other> value) : raw(Format::narrow(float(value))) {}

    operator float() const { return Format::widen(raw); }
    // Integers as a device converts them: toward zero, what does not fit to the nearest that does.
#define STAND_IN_TO(type)                                                                                            \
    operator type() const { return rounded<type>(truncf(Format::widen(raw))); }
    STAND_IN_TO(char)
    STAND_IN_TO(signed char)
    STAND_IN_TO(unsigned char)
    STAND_IN_TO(short)
    STAND_IN_TO(unsigned short)
    STAND_IN_TO(int)
    STAND_IN_TO(unsigned)
    STAND_IN_TO(long)
    STAND_IN_TO(unsigned long)
    STAND_IN_TO(long long)
    STAND_IN_TO(unsigned long long)
#undef STAND_IN_TO
    operator bool() const { return (raw & 0x7fff) != 0; }

    static SmallFloat from_bits(uint16_t raw) {
        SmallFloat value;
        value.raw = raw;
        return value;
    }
    float wide() const { return Format::widen(raw); }
    bool is_nan() const { return wide() != wide(); }

    friend SmallFloat operator+(const SmallFloat& a, const SmallFloat& b) { return a.wide() + b.wide(); }
    friend SmallFloat operator-(const SmallFloat& a, const SmallFloat& b) { return a.wide() - b.wide(); }
    friend SmallFloat operator*(const SmallFloat& a, const SmallFloat& b) { return a.wide() * b.wide(); }
    friend SmallFloat operator/(const SmallFloat& a, const SmallFloat& b) { return a.wide() / b.wide(); }
    friend SmallFloat operator-(const SmallFloat& a) { return from_bits(a.raw ^ 0x8000); }
    friend SmallFloat operator+(const SmallFloat& a) { return a; }
    friend SmallFloat& operator+=(SmallFloat& a, const SmallFloat& b) { return a = a + b; }
    friend SmallFloat& operator-=(SmallFloat& a, const SmallFloat& b) { return a = a - b; }
    friend SmallFloat& operator*=(SmallFloat& a, const SmallFloat& b) { return a = a * b; }
    friend SmallFloat& operator/=(SmallFloat& a, const SmallFloat& b) { return a = a / b; }
    friend bool operator==(const SmallFloat& a, const SmallFloat& b) { return a.wide() == b.wide(); }
    friend bool operator!=(const SmallFloat& a, const SmallFloat& b) { return a.wide() != b.wide(); }
    friend bool operator<(const SmallFloat& a, const SmallFloat& b) { return a.wide() < b.wide(); }
    friend bool operator>(const SmallFloat& a, const SmallFloat& b) { return a.wide() > b.wide(); }
    friend bool operator<=(const SmallFloat& a, const SmallFloat& b) { return a.wide() <= b.wide(); }
    friend bool operator>=(const SmallFloat& a, const SmallFloat& b) { return a.wide() >= b.wide(); }
};

template <typename Format>
struct alignas(4) SmallFloatPair {
    SmallFloat<Format> x, y;
    SmallFloatPair() = default;
    SmallFloatPair(SmallFloat<Format> x, SmallFloat<Format> y) : x(x), y(y) {}
};

}  // namespace stand_in

using __half = stand_in::SmallFloat<stand_in::HalfFormat>;
using __half2 = stand_in::SmallFloatPair<stand_in::HalfFormat>;
using __nv_bfloat16 = stand_in::SmallFloat<stand_in::BrainFormat>;
using __nv_bfloat162 = stand_in::SmallFloatPair<stand_in::BrainFormat>;
using half = __half;
using half2 = __half2;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

// ---- conversions, under the names that each type has for them ----------------------------------------------------

#define STAND_IN_CONVERSIONS(type, pair, name, pair_name, float2pair)                                                \
    inline type __float2##name(float value) { return type(value); }                                                  \
    inline type __float2##name##_rn(float value) { return type(value); }                                             \
    inline type __double2##name(double value) { return type(value); }                                                \
    inline float __##name##2float(type value) { return value.wide(); }                                               \
    inline int __##name##2int_rn(type value) { return __float2int_rn(value.wide()); }                                \
    inline int __##name##2int_rz(type value) { return __float2int_rz(value.wide()); }                                \
    inline type __int2##name##_rn(int value) { return type(value); }                                                 \
    inline type __uint2##name##_rn(unsigned value) { return type(value); }                                           \
    inline type __ushort_as_##name(unsigned short raw) { return type::from_bits(raw); }                              \
    inline type __short_as_##name(short raw) { return type::from_bits(uint16_t(raw)); }                              \
    inline unsigned short __##name##_as_ushort(type value) { return value.raw; }                                     \
    inline short __##name##_as_short(type value) { return short(value.raw); }                                        \
    inline pair __float2##pair_name##_rn(float value) { return {type(value), type(value)}; }                         \
    inline pair __floats2##pair_name##_rn(float x, float y) { return {type(x), type(y)}; }                           \
    inline pair float2pair(float2 both) { return {type(both.x), type(both.y)}; }                                     \
    inline pair __##name##2##pair_name(type value) { return {value, value}; }                                        \
    inline float2 __##pair_name##2float2(pair both) { return {both.x.wide(), both.y.wide()}; }                       \
    inline pair make_##pair_name(type x, type y) { return {x, y}; }
STAND_IN_CONVERSIONS(__half, __half2, half, half2, __float22half2_rn)
STAND_IN_CONVERSIONS(__nv_bfloat16, __nv_bfloat162, bfloat16, bfloat162, __float22bfloat162_rn)
#undef STAND_IN_CONVERSIONS
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }

// ---- functions that both types have under one name ---------------------------------------------------------------

#define STAND_IN_SMALL_FLOAT(type, pair)                                                                             \
    inline type __hadd(type a, type b) { return a + b; }                                                             \
    inline type __hsub(type a, type b) { return a - b; }                                                             \
    inline type __hmul(type a, type b) { return a * b; }                                                             \
    inline type __hadd_rn(type a, type b) { return a + b; }                                                          \
    inline type __hsub_rn(type a, type b) { return a - b; }                                                          \
    inline type __hmul_rn(type a, type b) { return a * b; }                                                          \
    inline type __hdiv(type a, type b) { return a / b; }                                                             \
    inline type __hneg(type a) { return -a; }                                                                        \
    inline type __habs(type a) { return type::from_bits(a.raw & 0x7fff); }                                           \
    inline type __hfma(type a, type b, type c) { return type(fma(double(a.wide()), double(b.wide()), double(c.wide()))); } \
    inline bool __hisnan(type a) { return a.is_nan(); }                                                              \
    inline int __hisinf(type a) { return std::isinf(a.wide()) ? (a.raw & 0x8000 ? -1 : 1) : 0; }                     \
    inline bool __heq(type a, type b) { return a == b; }                                                             \
    inline bool __hne(type a, type b) { return a.wide() < b.wide() || a.wide() > b.wide(); }                         \
    inline bool __hlt(type a, type b) { return a < b; }                                                              \
    inline bool __hle(type a, type b) { return a <= b; }                                                             \
    inline bool __hgt(type a, type b) { return a > b; }                                                              \
    inline bool __hge(type a, type b) { return a >= b; }                                                             \
    inline type __hmax(type a, type b) { return type(fmaxf(a.wide(), b.wide())); }                                   \
    inline type __hmin(type a, type b) { return type(fminf(a.wide(), b.wide())); }                                   \
    inline type __hmax_nan(type a, type b) { return a.is_nan() ? a : b.is_nan() ? b : __hmax(a, b); }                \
    inline type __hmin_nan(type a, type b) { return a.is_nan() ? a : b.is_nan() ? b : __hmin(a, b); }                \
    inline type hsqrt(type a) { return type(sqrtf(a.wide())); }                                                      \
    inline type hrsqrt(type a) { return type(1.0 / sqrt(double(a.wide()))); }                                        \
    inline type hrcp(type a) { return type(1.0 / double(a.wide())); }                                                \
    inline type hexp(type a) { return type(exp(double(a.wide()))); }                                                 \
    inline type hexp2(type a) { return type(exp2(double(a.wide()))); }                                               \
    inline type hlog(type a) { return type(log(double(a.wide()))); }                                                 \
    inline type hlog2(type a) { return type(log2(double(a.wide()))); }                                               \
    inline type hsin(type a) { return type(sin(double(a.wide()))); }                                                 \
    inline type hcos(type a) { return type(cos(double(a.wide()))); }                                                 \
    inline type htanh(type a) { return type(tanh(double(a.wide()))); }                                               \
    inline type hceil(type a) { return type(ceilf(a.wide())); }                                                      \
    inline type hfloor(type a) { return type(floorf(a.wide())); }                                                    \
    inline type htrunc(type a) { return type(truncf(a.wide())); }                                                    \
    inline type hrint(type a) { return type(nearbyintf(a.wide())); }                                                 \
    inline float __low2float(pair both) { return both.x.wide(); }                                                    \
    inline float __high2float(pair both) { return both.y.wide(); }                                                   \
    inline pair __hadd2(pair a, pair b) { return {a.x + b.x, a.y + b.y}; }                                           \
    inline pair __hsub2(pair a, pair b) { return {a.x - b.x, a.y - b.y}; }                                           \
    inline pair __hmul2(pair a, pair b) { return {a.x * b.x, a.y * b.y}; }                                           \
    inline pair __hfma2(pair a, pair b, pair c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }           \
    inline pair __hneg2(pair a) { return {-a.x, -a.y}; }                                                             \
    inline pair __hmax2(pair a, pair b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }                             \
    inline pair __hmin2(pair a, pair b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }                             \
    inline pair operator+(const pair& a, const pair& b) { return __hadd2(a, b); }                                    \
    inline pair operator-(const pair& a, const pair& b) { return __hsub2(a, b); }                                    \
    inline pair operator*(const pair& a, const pair& b) { return __hmul2(a, b); }
STAND_IN_SMALL_FLOAT(__half, __half2)
STAND_IN_SMALL_FLOAT(__nv_bfloat16, __nv_bfloat162)
#undef STAND_IN_SMALL_FLOAT
inline __half __low2half(__half2 both) { return both.x; }
inline __half __high2half(__half2 both) { return both.y; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 both) { return both.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 both) { return both.y; }

// ---- eight bits --------------------------------------------------------------------------------------------------

typedef unsigned char __nv_fp8_storage_t;
enum __nv_fp8_interpretation_t { __NV_E4M3, __NV_E5M2 };

// Four bits of exponent, three of mantissa, no infinities: what is too great becomes the greatest value, 448.
struct __nv_fp8_e4m3 {
    __nv_fp8_storage_t __x;

    __nv_fp8_e4m3() = default;
    explicit __nv_fp8_e4m3(double value) {
        // The format's greatest value and what rounds to it have the exponent that would mean infinity.
        if (value != value) {
            __x = 0x7f;
        } else if (std::fabs(value) >= 256) {
            const int eighths = std::min(int(std::nearbyint(std::fabs(value) / 32 > 14 ? 14 : std::fabs(value) / 32)), 14);
            __x = __nv_fp8_storage_t(0x78 + eighths - 8);
            if (value < 0) __x |= 0x80;
        } else {
            __x = __nv_fp8_storage_t(stand_in::narrow<4, 3>(value));
        }
    }
    explicit __nv_fp8_e4m3(float value) : __nv_fp8_e4m3(double(value)) {}
    explicit __nv_fp8_e4m3(int value) : __nv_fp8_e4m3(double(value)) {}
    explicit __nv_fp8_e4m3(unsigned value) : __nv_fp8_e4m3(double(value)) {}
    explicit __nv_fp8_e4m3(long value) : __nv_fp8_e4m3(double(value)) {}
    explicit __nv_fp8_e4m3(unsigned long value) : __nv_fp8_e4m3(double(value)) {}
    explicit __nv_fp8_e4m3(__half value) : __nv_fp8_e4m3(double(value.wide())) {}
    explicit __nv_fp8_e4m3(__nv_bfloat16 value) : __nv_fp8_e4m3(double(value.wide())) {}
    explicit operator float() const {
        if ((__x & 0x7f) == 0x7f) return NAN;
        if ((__x & 0x78) == 0x78) return std::copysign(32.0f * float(8 + (__x & 7)), __x & 0x80 ? -1.0f : 1.0f);
        return stand_in::widen<4, 3>(__x);
    }
};
inline __half __nv_cvt_fp8_to_halfraw(__nv_fp8_storage_t raw, __nv_fp8_interpretation_t) {
    __nv_fp8_e4m3 value;
    value.__x = raw;
    return __half(float(value));
}
