// The bits of floats: conversions to and from narrow formats, rounding to the nearest value, ties to even.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace stand_in {

template <typename To, typename From>
To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits as another type");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// Rounds `value` to a float of `exponent_bits` and `mantissa_bits` and returns its bits. The sign goes on top.
template <int exponent_bits, int mantissa_bits>
unsigned narrow(double value) {
    constexpr int bias = (1 << (exponent_bits - 1)) - 1;
    constexpr unsigned infinite = ((1u << exponent_bits) - 1) << mantissa_bits;
    const uint64_t whole = bits<uint64_t>(value);
    const unsigned sign = unsigned(whole >> 63) << (exponent_bits + mantissa_bits);
    if (value != value) return infinite | ((1u << mantissa_bits) - 1);
    if (std::isinf(value)) return sign | infinite;
    const int exponent = int(whole >> 52 & 2047) - 1023;
    if (exponent == -1023) return sign;
    const uint64_t mantissa = (whole & ((uint64_t(1) << 52) - 1)) | uint64_t(1) << 52;
    // Below the smallest normal value the steps stay as wide as there.
    const int step = std::max(exponent, 1 - bias);
    const int shift = 52 - mantissa_bits + (step - exponent);
    if (shift > 53) return sign;
    const uint64_t half = uint64_t(1) << (shift - 1);
    uint64_t rounded = mantissa >> shift;
    const uint64_t rest = mantissa & ((uint64_t(1) << shift) - 1);
    if (rest > half || (rest == half && (rounded & 1))) ++rounded;
    // The leading one of a normal mantissa, and a carry into it, add one to the exponent field.
    const uint64_t magnitude = (uint64_t(step + bias - 1) << mantissa_bits) + rounded;
    return sign | unsigned(std::min<uint64_t>(magnitude, infinite));
}

// The value of such a float; exact.
template <int exponent_bits, int mantissa_bits>
float widen(unsigned value) {
    constexpr int bias = (1 << (exponent_bits - 1)) - 1;
    constexpr unsigned top = (1u << exponent_bits) - 1;
    const unsigned exponent = value >> mantissa_bits & top;
    const unsigned mantissa = value & ((1u << mantissa_bits) - 1);
    const unsigned sign = (value >> (exponent_bits + mantissa_bits) & 1) << 31;
    if (exponent == top) return bits<float>(sign | 0x7f800000u | mantissa << (23 - mantissa_bits));
    const float magnitude = exponent == 0 ? std::ldexp(float(mantissa), 1 - bias - mantissa_bits)
                                          : std::ldexp(float(mantissa | 1u << mantissa_bits), int(exponent) - bias - mantissa_bits);
    return bits<float>(bits<unsigned>(magnitude) | sign);
}

struct HalfFormat {
    static uint16_t narrow(double value) { return uint16_t(stand_in::narrow<5, 10>(value)); }
    static float widen(uint16_t bits) { return stand_in::widen<5, 10>(bits); }
    static constexpr uint16_t nan = 0x7fff;
};
struct BrainFormat {
    static uint16_t narrow(double value) { return uint16_t(stand_in::narrow<8, 7>(value)); }
    static float widen(uint16_t value) { return bits<float>(unsigned(value) << 16); }
    static constexpr uint16_t nan = 0x7fff;
};

}  // namespace stand_in
