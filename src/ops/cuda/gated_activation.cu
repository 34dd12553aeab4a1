// The gate of a feed-forward layer: activation(gate) · up, and its gradients.
//
// `kind` is the place of the function in `ops::Activation`: 0 SiLU, 1 the tanh approximation of GELU, 2 GELU. The
// formulas are those of `gated_activation.rs`; `expf` and `erfcf` take the place of its own.
//
// Launch of both: blocks of 256 threads, as many as there are packs of `WIDE` values for them or fewer. No dynamic
// shared memory. Results may lie where arguments lie, at the same place.

// A function's value and slope.
struct Activated {
    float value, slope;
};

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// x · sigmoid(x)
struct Silu {
    static __device__ __forceinline__ Activated at(float x) {
        const float s = sigmoid(x);
        return {x * s, s * (1.0f + x * (1.0f - s))};
    }
};

// x · sigmoid(2z), z = √(2/π) (x + 0.044715 x³): the same as x · (1 + tanh z) / 2.
struct GeluTanh {
    static __device__ __forceinline__ Activated at(float x) {
        constexpr float TWICE_ROOT = 1.595769f;
        constexpr float CUBIC = 0.044715f;
        const float square = x * x;
        const float s = sigmoid(TWICE_ROOT * x * (1.0f + CUBIC * square));
        const float slope_of_z = TWICE_ROOT * (1.0f + 3.0f * CUBIC * square);
        return {x * s, s + x * s * (1.0f - s) * slope_of_z};
    }
};

// x · Φ(x)
struct Gelu {
    static __device__ __forceinline__ Activated at(float x) {
        constexpr float ROOT_HALF = 0.70710678f;
        constexpr float DENSITY = 0.3989423f;
        const float phi = 0.5f * erfcf(-x * ROOT_HALF);
        return {x * phi, phi + x * DENSITY * expf(-0.5f * x * x)};
    }
};

template <typename Activation> struct Forward {
    template <int WIDTH>
    static __device__ __forceinline__ void at(long long at, const real* gate, const real* up, real* y) {
        Pack<real, WIDTH> gates = load<WIDTH>(gate + at);
        const Pack<real, WIDTH> ups = load<WIDTH>(up + at);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            gates.values[i] = narrow<real>(Activation::at(widen(gates.values[i])).value * widen(ups.values[i]));
        }
        store(y + at, gates);
    }
};

extern "C" __global__ void __launch_bounds__(256)
gated_activation(const real* gate, const real* up, real* y, long long n, int kind) {
    const bool wide = aligned(gate, up, y);
    switch (kind) {
        case 0: return over_grid<Forward<Silu>, WIDE>(n, wide, gate, up, y);
        case 1: return over_grid<Forward<GeluTanh>, WIDE>(n, wide, gate, up, y);
        case 2: return over_grid<Forward<Gelu>, WIDE>(n, wide, gate, up, y);
    }
}

template <typename Activation> struct Backward {
    template <int WIDTH>
    static __device__ __forceinline__ void at(
        long long at, const real* gate, const real* up, const real* dy, real* dgate, real* dup
    ) {
        Pack<real, WIDTH> gates = load<WIDTH>(gate + at), ups = load<WIDTH>(up + at);
        const Pack<real, WIDTH> slopes = load<WIDTH>(dy + at);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            const Activated activated = Activation::at(widen(gates.values[i]));
            const float slope = widen(slopes.values[i]);
            gates.values[i] = narrow<real>(slope * widen(ups.values[i]) * activated.slope);
            ups.values[i] = narrow<real>(slope * activated.value);
        }
        store(dgate + at, gates);
        store(dup + at, ups);
    }
};

extern "C" __global__ void __launch_bounds__(256) gated_activation_gradients(
    const real* gate, const real* up, const real* dy, real* dgate, real* dup, long long n, int kind
) {
    const bool wide = aligned(gate, up, dy, dgate, dup);
    switch (kind) {
        case 0: return over_grid<Backward<Silu>, WIDE>(n, wide, gate, up, dy, dgate, dup);
        case 1: return over_grid<Backward<GeluTanh>, WIDE>(n, wide, gate, up, dy, dgate, dup);
        case 2: return over_grid<Backward<Gelu>, WIDE>(n, wide, gate, up, dy, dgate, dup);
    }
}
