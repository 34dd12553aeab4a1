// CUDA C++ on a CPU, for tests: included before the text of a `.cu` file it makes g++ or clang (C++17) accept the
// kernels in it, and `stand_in::launch` runs them with the semantics of a device.
//
//     g++ -std=c++17 -O1 -ffp-contract=off -I tests/cuda_stand_in/include -include tests/cuda_stand_in/stand_in.h -x c++ kernel.cu
//
// Blocks run one after the other; each thread of a block is a fiber, which runs until it meets a barrier or a warp
// exchange. What would be undefined on a device ends the program with a message that names kernel, block and thread:
// a barrier that some threads returned before, a warp operation that not every lane of its mask reaches, a shuffle
// from a lane that does not take part. Dynamic shared memory is full of NaN (bytes 0xff) when a block starts.
//
// `STAND_IN_REVERSE=1` in the environment runs threads and blocks in the opposite order: a kernel without races gives
// the same bits in both. Compiled with `-DSTAND_IN_LENIENT`, for code that is not ours, threads that have returned
// no longer count at barriers and in masks, as on hardware.
//
// Not here: clusters, cooperative groups, textures, inline PTX, rounding modes other than to nearest. A product and a
// sum are never contracted, which nvcc may do: compare with a tolerance, or write `__fmaf_rn`.

#pragma once

// Every standard header a kernel may ask for comes before the macros below: they use names of the implementation.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cassert>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include "bits.h"

#define RETUNE_STAND_IN 1
#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 800
#endif
#ifndef __CUDACC_VER_MAJOR__
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0
#endif

#define __global__ __attribute__((used))
#define __device__
#define __host__
#define __constant__ static
#define __managed__
#define __shared__ static thread_local
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __grid_constant__
#define SHARED_MEMORY(type, name) type* name = static_cast<type*>(stand_in::dynamic_shared_memory())

// ---- vector types ------------------------------------------------------------------------------------------------

#define STAND_IN_VECTORS(element, name, align2, align4)                                                              \
    struct name##1 { element x; };                                                                                   \
    struct alignas(align2) name##2 { element x, y; };                                                                \
    struct name##3 { element x, y, z; };                                                                             \
    struct alignas(align4) name##4 { element x, y, z, w; };                                                          \
    static inline name##1 make_##name##1(element x) { return {x}; }                                                  \
    static inline name##2 make_##name##2(element x, element y) { return {x, y}; }                                    \
    static inline name##3 make_##name##3(element x, element y, element z) { return {x, y, z}; }                      \
    static inline name##4 make_##name##4(element x, element y, element z, element w) { return {x, y, z, w}; }
STAND_IN_VECTORS(signed char, char, 2, 4)
STAND_IN_VECTORS(unsigned char, uchar, 2, 4)
STAND_IN_VECTORS(short, short, 4, 8)
STAND_IN_VECTORS(unsigned short, ushort, 4, 8)
STAND_IN_VECTORS(int, int, 8, 16)
STAND_IN_VECTORS(unsigned int, uint, 8, 16)
STAND_IN_VECTORS(long, long, 16, 16)
STAND_IN_VECTORS(unsigned long, ulong, 16, 16)
STAND_IN_VECTORS(long long, longlong, 16, 16)
STAND_IN_VECTORS(unsigned long long, ulonglong, 16, 16)
STAND_IN_VECTORS(float, float, 8, 16)
STAND_IN_VECTORS(double, double, 16, 16)
#undef STAND_IN_VECTORS

struct dim3 {
    unsigned int x, y, z;
    constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
    constexpr dim3(uint3 size) : x(size.x), y(size.y), z(size.z) {}
    operator uint3() const { return {x, y, z}; }
};

// ---- fibers ------------------------------------------------------------------------------------------------------

namespace stand_in {

constexpr unsigned warp_lanes = 32;
// The most bytes a lane may give to one exchange.
constexpr size_t exchange_bytes = 512;

#if defined(STAND_IN_LENIENT)
constexpr bool lenient = true;
#else
constexpr bool lenient = false;
#endif

// A stack that can be entered, left in the middle and entered again, always by the same thread of the system.
class Fiber {
public:
    Fiber() {
        memory = static_cast<unsigned char*>(
            mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (memory == MAP_FAILED) {
            std::perror("cuda stand-in: a stack for a thread");
            std::abort();
        }
        // A stack that is too deep stops at the page below it instead of running into its neighbour.
        mprotect(memory, 4096, PROT_NONE);
    }
    ~Fiber() { munmap(memory, bytes); }
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

#if defined(__x86_64__)
    // Makes the next `enter` begin at `start`, which leaves for the last time instead of returning.
    void prepare(void (*start)()) {
        void** top = reinterpret_cast<void**>(memory + bytes) - 2;
        // The address that a call would have left: none, since `start` never returns.
        *--top = nullptr;
        *--top = reinterpret_cast<void*>(start);
        for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
        inside = top;
    }
    void enter() { switch_stacks(&outside, inside); }
    void leave() { switch_stacks(&inside, outside); }

private:
    // Keeps what a function must preserve (rbx, rbp, r12 to r15) on the old stack and takes it from the new one.
    __attribute__((naked, noinline)) static void switch_stacks(void** /*old_stack*/, void* /*new_stack*/) {
        __asm__ volatile(
            "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
            "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
            "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
            "ret\n");
    }
    void* inside = nullptr;
    void* outside = nullptr;
#else
    void prepare(void (*start)()) {
        getcontext(&inside);
        inside.uc_stack.ss_sp = memory;
        inside.uc_stack.ss_size = bytes;
        inside.uc_link = nullptr;
        makecontext(&inside, start, 0);
    }
    void enter() { swapcontext(&outside, &inside); }
    void leave() { swapcontext(&inside, &outside); }

private:
    ucontext_t inside, outside;
#endif
    static constexpr size_t bytes = 256 * 1024;
    unsigned char* memory;
};

// ---- blocks ------------------------------------------------------------------------------------------------------

// What a thread of a block is doing between two turns.
enum class State { ready, at_barrier, in_warp, returned };

struct Thread {
    std::unique_ptr<Fiber> fiber;
    uint3 index;
    State state;
    // While `in_warp`: the operation's name, the lanes it was called for, and the bytes each of them gives.
    const char* operation;
    unsigned mask;
    size_t bytes;
    // The lanes that took part in the last operation.
    unsigned met;
    // Which of its two slots a thread writes next: it may come to the next exchange before others have read this one.
    unsigned turn;
    // The slot filled for the last exchange that took place.
    unsigned published;
    unsigned char slots[2][exchange_bytes];
};

// Runs the blocks of one launch on the calling thread of the system; kept for the next launch, for its stacks.
class Machine {
public:
    uint3 thread_index{}, block_index{};
    dim3 block_size, grid_size;
    std::vector<unsigned char> shared_memory;

    static Machine& get() {
        static thread_local Machine machine;
        return machine;
    }

    // Calls `body(argument)` once for each thread of each block. `kernel` names it in messages.
    void run(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* argument) {
        const size_t count = size_t(block.x) * block.y * block.z;
        this->kernel = kernel;
        if (running) fail("launches from within a kernel are not supported");
        if (count == 0 || count > 1024 || block.z > 64) fail("a block of %u x %u x %u threads", block.x, block.y, block.z);
        if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
            fail("a grid of %u x %u x %u blocks", grid.x, grid.y, grid.z);
        }
        this->body = body;
        this->argument = argument;
        grid_size = grid;
        block_size = block;
        while (threads.size() < count) {
            threads.push_back(std::make_unique<Thread>());
            threads.back()->fiber = std::make_unique<Fiber>();
        }
        const char* order = std::getenv("STAND_IN_REVERSE");
        reverse = order && *order && *order != '0';
        running = true;
        const size_t blocks = size_t(grid.x) * grid.y * grid.z;
        for (size_t position = 0; position < blocks; ++position) {
            const size_t number = reverse ? blocks - 1 - position : position;
            block_index.x = number % grid.x;
            block_index.y = number / grid.x % grid.y;
            block_index.z = number / grid.x / grid.y;
            shared_memory.assign(shared_bytes + 16, 0xff);
            run_block(count);
        }
        running = false;
    }

    // `__syncthreads`.
    void barrier() {
        current->state = State::at_barrier;
        current->fiber->leave();
    }

    // Waits until every lane of `mask` has called this with the same `operation`, `mask` and `bytes`. Then `gathered`
    // gives what each of them brought.
    void meet(const char* operation, unsigned mask, const void* mine, size_t bytes) {
        Thread& self = *current;
        if (bytes > exchange_bytes) fail("`%s` of %zu bytes per lane", operation, bytes);
        if (!(mask >> lane() & 1)) fail("`%s` with mask %08x, in which the calling lane %u is not", operation, mask, lane());
        if (bytes) std::memcpy(self.slots[self.turn], mine, bytes);
        self.state = State::in_warp;
        self.operation = operation;
        self.mask = mask;
        self.bytes = bytes;
        self.fiber->leave();
    }

    // The bytes that lane `source` of this warp gave to the exchange that the calling thread has just returned from.
    const void* gathered(unsigned source) {
        if (!(current->met >> source & 1)) {
            if (!lenient) fail("`%s` reads lane %u, which does not take part", current->operation, source);
            source = lane();
        }
        const Thread& giver = *threads[current_number - lane() + source];
        return giver.slots[giver.published];
    }

    // The lanes that took part in the exchange that the calling thread has just returned from.
    unsigned met() const { return current->met; }
    unsigned lane() const { return current_number % warp_lanes; }
    // The lanes of this warp that have not returned.
    unsigned active() const {
        unsigned lanes = 0;
        const size_t first = current_number / warp_lanes * warp_lanes;
        for (size_t number = first; number < std::min(first + warp_lanes, thread_count); ++number) {
            if (threads[number]->state != State::returned) lanes |= 1u << (number - first);
        }
        return lanes;
    }

    // Prints where the machine is and what is wrong, and ends the program: a kernel cannot be left.
    [[noreturn]] __attribute__((format(printf, 2, 3))) void fail(const char* format, ...) {
        std::fprintf(stderr, "cuda stand-in: kernel `%s`", kernel);
        if (running) {
            std::fprintf(stderr, ", block (%u, %u, %u), thread (%u, %u, %u)", block_index.x, block_index.y, block_index.z,
                         thread_index.x, thread_index.y, thread_index.z);
        }
        std::fprintf(stderr, ": ");
        va_list arguments;
        va_start(arguments, format);
        std::vfprintf(stderr, format, arguments);
        va_end(arguments);
        std::fprintf(stderr, "\n");
        std::abort();
    }

private:
    const char* kernel = "";
    void (*body)(void*) = nullptr;
    void* argument = nullptr;
    bool running = false;
    bool reverse = false;
    std::vector<std::unique_ptr<Thread>> threads;
    size_t thread_count = 0;
    size_t current_number = 0;
    Thread* current = nullptr;

    static void start() {
        Machine& machine = get();
        machine.body(machine.argument);
        machine.current->state = State::returned;
        machine.current->fiber->leave();
        std::abort();
    }

    void run_block(size_t count) {
        thread_count = count;
        for (size_t number = 0; number < count; ++number) {
            Thread& thread = *threads[number];
            thread.index.x = number % block_size.x;
            thread.index.y = number / block_size.x % block_size.y;
            thread.index.z = number / block_size.x / block_size.y;
            thread.state = State::ready;
            thread.turn = 0;
            thread.met = 0;
            thread.operation = "";
            thread.fiber->prepare(start);
        }
        const size_t warps = (count + warp_lanes - 1) / warp_lanes;
        for (;;) {
            for (size_t position = 0; position < warps; ++position) {
                run_warp((reverse ? warps - 1 - position : position) * warp_lanes);
            }
            size_t waiting = 0;
            for (size_t number = 0; number < count; ++number) waiting += threads[number]->state == State::at_barrier;
            if (waiting == 0) return;
            if (waiting < count && !lenient) report_barrier();
            for (size_t number = 0; number < count; ++number) {
                if (threads[number]->state == State::at_barrier) threads[number]->state = State::ready;
            }
        }
    }

    // Runs the warp whose first thread is `first` until all its threads have returned or wait at a barrier.
    void run_warp(size_t first) {
        const size_t lanes = std::min<size_t>(warp_lanes, thread_count - first);
        for (;;) {
            for (size_t position = 0; position < lanes; ++position) {
                const size_t number = first + (reverse ? lanes - 1 - position : position);
                Thread& thread = *threads[number];
                if (thread.state != State::ready) continue;
                current = &thread;
                current_number = number;
                thread_index = thread.index;
                thread.fiber->enter();
            }
            bool released = false;
            bool stuck = false;
            for (size_t lane = 0; lane < lanes; ++lane) {
                if (threads[first + lane]->state != State::in_warp) continue;
                if (release(first, lanes, *threads[first + lane])) {
                    released = true;
                } else {
                    stuck = true;
                }
            }
            if (released) continue;
            if (stuck) report_warp(first, lanes);
            return;
        }
    }

    // Lets the lanes go on that are in the same operation as `waiting`, if they are all there.
    bool release(size_t first, size_t lanes, const Thread& waiting) {
        const unsigned mask = waiting.mask;
        const size_t bytes = waiting.bytes;
        unsigned there = 0;
        for (size_t lane = 0; lane < lanes; ++lane) {
            const Thread& other = *threads[first + lane];
            if (!(mask >> lane & 1) || (lenient && other.state == State::returned)) continue;
            if (other.state != State::in_warp || other.mask != mask || other.bytes != bytes) return false;
            if (std::strcmp(other.operation, waiting.operation) != 0) return false;
            there |= 1u << lane;
        }
        for (size_t lane = 0; lane < lanes; ++lane) {
            if (!(there >> lane & 1)) continue;
            Thread& other = *threads[first + lane];
            other.state = State::ready;
            other.met = there;
            other.published = other.turn;
            other.turn ^= 1;
        }
        return true;
    }

    void point_at(size_t number) {
        current_number = number;
        current = threads[number].get();
        thread_index = current->index;
    }

    [[noreturn]] void report_barrier() {
        size_t returned = thread_count, waits = thread_count;
        for (size_t number = thread_count; number-- > 0;) {
            if (threads[number]->state == State::returned) returned = number;
            if (threads[number]->state == State::at_barrier) waits = number;
        }
        point_at(returned);
        const uint3 waiting = threads[waits]->index;
        fail("returned, while thread (%u, %u, %u) waits in `__syncthreads`", waiting.x, waiting.y, waiting.z);
    }

    [[noreturn]] void report_warp(size_t first, size_t lanes) {
        size_t waits = 0;
        while (threads[first + waits]->state != State::in_warp) ++waits;
        const Thread& waiting = *threads[first + waits];
        for (size_t lane = 0; lane < lanes; ++lane) {
            const Thread& other = *threads[first + lane];
            if (!(waiting.mask >> lane & 1) || &other == &waiting) continue;
            const bool together = other.state == State::in_warp && other.mask == waiting.mask && other.bytes == waiting.bytes &&
                                  std::strcmp(other.operation, waiting.operation) == 0;
            if (together) continue;
            point_at(first + waits);
            const char* does = other.state == State::returned     ? "has returned"
                               : other.state == State::at_barrier ? "waits in `__syncthreads`"
                                                                  : other.operation;
            fail("`%s` with mask %08x and %zu bytes waits for lane %zu, which is elsewhere: %s (mask %08x, %zu bytes)",
                 waiting.operation, waiting.mask, waiting.bytes, lane, does, other.mask, other.bytes);
        }
        point_at(first + waits);
        fail("`%s` waits for lanes of mask %08x that the block does not have", waiting.operation, waiting.mask);
    }
};

inline void* dynamic_shared_memory() {
    const uintptr_t start = reinterpret_cast<uintptr_t>(Machine::get().shared_memory.data());
    return reinterpret_cast<void*>((start + 15) & ~uintptr_t(15));
}

// ---- launching ---------------------------------------------------------------------------------------------------

// A kernel whose parameters come as the driver gets them: an array of pointers to values.
struct Kernel {
    const char* name;
    void (*function)();
    void (*call)(void (*function)(), void** parameters);
    size_t parameters;
};

namespace detail {
template <typename... Parameters, size_t... Positions>
void call(void (*function)(Parameters...), void** parameters, std::index_sequence<Positions...>) {
    (void)parameters;
    function(*static_cast<std::remove_reference_t<Parameters>*>(parameters[Positions])...);
}
template <typename... Parameters>
void call_unpacked(void (*function)(), void** parameters) {
    call(reinterpret_cast<void (*)(Parameters...)>(function), parameters, std::index_sequence_for<Parameters...>());
}
}  // namespace detail

template <typename... Parameters>
Kernel describe(const char* name, void (*function)(Parameters...)) {
    return {name, reinterpret_cast<void (*)()>(function), detail::call_unpacked<Parameters...>, sizeof...(Parameters)};
}

inline void launch(const Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes, void** parameters) {
    struct Call {
        const Kernel& kernel;
        void** parameters;
    } call{kernel, parameters};
    const auto body = [](void* argument) {
        const Call& call = *static_cast<Call*>(argument);
        call.kernel.call(call.kernel.function, call.parameters);
    };
    Machine::get().run(kernel.name, grid, block, shared_bytes, body, &call);
}

// `kernel<<<grid, block, shared_bytes>>>(arguments...)`, for programs that hold the kernel itself.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Arguments... arguments) {
    static_assert(sizeof...(Parameters) == sizeof...(Arguments), "as many arguments as the kernel has parameters");
    std::tuple<std::remove_cv_t<Parameters>...> values(static_cast<Parameters>(arguments)...);
    std::apply(
        [&](auto&... value) {
            void* parameters[] = {const_cast<void*>(static_cast<const void*>(&value))..., nullptr};
            launch(describe("launched by address", kernel), grid, block, shared_bytes, parameters);
        },
        values);
}

// The kernels of a program by name: `STAND_IN_KERNEL(rms_norm);` after the kernel's text, then `find("rms_norm")`.
inline std::map<std::string, Kernel>& registry() {
    static std::map<std::string, Kernel> kernels;
    return kernels;
}
inline const Kernel* find(const std::string& name) {
    const auto found = registry().find(name);
    return found == registry().end() ? nullptr : &found->second;
}
struct Registration {
    template <typename... Parameters>
    Registration(const char* name, void (*function)(Parameters...)) {
        registry()[name] = describe(name, function);
    }
};
#define STAND_IN_KERNEL(kernel) static const stand_in::Registration stand_in_registration_##kernel(#kernel, kernel)

// ---- warps -------------------------------------------------------------------------------------------------------

template <typename Value>
Value shuffle(const char* operation, unsigned mask, Value value, unsigned source) {
    static_assert(std::is_trivially_copyable<Value>::value, "only plain values can be shuffled");
    Machine& machine = Machine::get();
    machine.meet(operation, mask, &value, sizeof value);
    Value taken;
    std::memcpy(&taken, machine.gathered(source), sizeof taken);
    return taken;
}

// The lanes of `mask` whose `predicate` holds.
inline unsigned ballot(const char* operation, unsigned mask, int predicate) {
    Machine& machine = Machine::get();
    machine.meet(operation, mask, &predicate, sizeof predicate);
    unsigned lanes = 0;
    for (unsigned lane = 0; lane < warp_lanes; ++lane) {
        if (!(machine.met() >> lane & 1)) continue;
        int theirs;
        std::memcpy(&theirs, machine.gathered(lane), sizeof theirs);
        lanes |= unsigned(theirs != 0) << lane;
    }
    return lanes;
}

// Combines the values of the lanes of `mask`, in the order of lanes.
template <typename Value, typename Operation>
Value reduce(const char* name, unsigned mask, Value value, Operation operation) {
    Machine& machine = Machine::get();
    machine.meet(name, mask, &value, sizeof value);
    bool first = true;
    Value all{};
    for (unsigned lane = 0; lane < warp_lanes; ++lane) {
        if (!(machine.met() >> lane & 1)) continue;
        Value theirs;
        std::memcpy(&theirs, machine.gathered(lane), sizeof theirs);
        all = first ? theirs : operation(all, theirs);
        first = false;
    }
    return all;
}

}  // namespace stand_in

// For the portable bodies of hardware instructions: every lane of the warp gives `bytes` (512 at most) and gets those of
// all 32 in the order of lanes. `all` has room for 32 * bytes. All lanes of the warp call it.
inline void stand_in_exchange(const void* mine, size_t bytes, void* all) {
    stand_in::Machine& machine = stand_in::Machine::get();
    machine.meet("stand_in_exchange", 0xffffffffu, mine, bytes);
    for (unsigned lane = 0; lane < stand_in::warp_lanes; ++lane) {
        std::memcpy(static_cast<unsigned char*>(all) + lane * bytes, machine.gathered(lane), bytes);
    }
}

#define threadIdx (stand_in::Machine::get().thread_index)
#define blockIdx (stand_in::Machine::get().block_index)
#define blockDim (stand_in::Machine::get().block_size)
#define gridDim (stand_in::Machine::get().grid_size)
#define warpSize 32

inline void __syncthreads() { stand_in::Machine::get().barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { stand_in::Machine::get().meet("__syncwarp", mask, nullptr, 0); }

// A source outside of the lane's segment of `width` lanes means the lane itself, as in PTX's `shfl`.
template <typename Value>
Value __shfl_sync(unsigned mask, Value value, int source, int width = 32) {
    const unsigned lane = stand_in::Machine::get().lane();
    return stand_in::shuffle("__shfl_sync", mask, value, (lane & ~(width - 1)) | (source & (width - 1)));
}
template <typename Value>
Value __shfl_up_sync(unsigned mask, Value value, unsigned delta, int width = 32) {
    const unsigned lane = stand_in::Machine::get().lane();
    return stand_in::shuffle("__shfl_up_sync", mask, value, (lane & (width - 1)) < delta ? lane : lane - delta);
}
template <typename Value>
Value __shfl_down_sync(unsigned mask, Value value, unsigned delta, int width = 32) {
    const unsigned lane = stand_in::Machine::get().lane();
    const bool inside = (lane & (width - 1)) + delta < unsigned(width);
    return stand_in::shuffle("__shfl_down_sync", mask, value, inside ? lane + delta : lane);
}
template <typename Value>
Value __shfl_xor_sync(unsigned mask, Value value, int bits, int width = 32) {
    const unsigned lane = stand_in::Machine::get().lane();
    const unsigned last = lane | (width - 1);
    return stand_in::shuffle("__shfl_xor_sync", mask, value, (lane ^ bits) <= last ? lane ^ bits : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) { return stand_in::ballot("__ballot_sync", mask, predicate); }
inline int __any_sync(unsigned mask, int predicate) { return stand_in::ballot("__any_sync", mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return stand_in::ballot("__all_sync", mask, !predicate) == 0; }
inline unsigned __activemask() { return stand_in::Machine::get().active(); }
template <typename Value>
Value __reduce_add_sync(unsigned mask, Value value) {
    return stand_in::reduce("__reduce_add_sync", mask, value, [](Value a, Value b) { return Value(a + b); });
}
template <typename Value>
Value __reduce_max_sync(unsigned mask, Value value) {
    return stand_in::reduce("__reduce_max_sync", mask, value, [](Value a, Value b) { return a < b ? b : a; });
}
template <typename Value>
Value __reduce_min_sync(unsigned mask, Value value) {
    return stand_in::reduce("__reduce_min_sync", mask, value, [](Value a, Value b) { return b < a ? b : a; });
}

// ---- memory ------------------------------------------------------------------------------------------------------

template <typename Value>
Value __ldg(const Value* address) { return *address; }
template <typename Value>
Value __ldcs(const Value* address) { return *address; }
template <typename Value>
Value __ldcg(const Value* address) { return *address; }
template <typename Value>
void __stcs(Value* address, Value value) { *address = value; }
template <typename Value>
void __stcg(Value* address, Value value) { *address = value; }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
[[noreturn]] inline void __trap() { stand_in::Machine::get().fail("`__trap`"); }

// One thread runs at a time, so plain arithmetic is atomic. Each returns the value before.
namespace stand_in {
template <typename Value>
struct identity {
    using type = Value;
};
template <typename Value, typename Operation>
Value change(Value* address, Operation operation) {
    const Value before = *address;
    *address = operation(before);
    return before;
}
}  // namespace stand_in
#define STAND_IN_ATOMIC(name, expression)                                                                            \
    template <typename Value>                                                                                        \
    Value name(Value* address, typename stand_in::identity<Value>::type value) {                                     \
        return stand_in::change(address, [&](Value before) -> Value { return expression; });                         \
    }
STAND_IN_ATOMIC(atomicAdd, before + value)
STAND_IN_ATOMIC(atomicSub, before - value)
STAND_IN_ATOMIC(atomicMax, before < value ? value : before)
STAND_IN_ATOMIC(atomicMin, value < before ? value : before)
STAND_IN_ATOMIC(atomicAnd, before & value)
STAND_IN_ATOMIC(atomicOr, before | value)
STAND_IN_ATOMIC(atomicXor, before ^ value)
STAND_IN_ATOMIC(atomicExch, ((void)before, value))
STAND_IN_ATOMIC(atomicInc, before >= value ? 0 : before + 1)
STAND_IN_ATOMIC(atomicDec, before == 0 || before > value ? value : before - 1)
#undef STAND_IN_ATOMIC
template <typename Value>
Value atomicCAS(Value* address, typename stand_in::identity<Value>::type compare,
                typename stand_in::identity<Value>::type value) {
    return stand_in::change(address, [&](Value before) { return before == compare ? value : before; });
}

// ---- numbers -----------------------------------------------------------------------------------------------------

// As on the device: one overload for each type, mixed signs give the unsigned type, and of a NaN and a number the number.
#define STAND_IN_MIN_MAX(left, right, result)                                                                        \
    constexpr result min(left a, right b) { return (result)b < (result)a ? (result)b : (result)a; }                  \
    constexpr result max(left a, right b) { return (result)a < (result)b ? (result)b : (result)a; }
STAND_IN_MIN_MAX(int, int, int)
STAND_IN_MIN_MAX(unsigned, unsigned, unsigned)
STAND_IN_MIN_MAX(int, unsigned, unsigned)
STAND_IN_MIN_MAX(unsigned, int, unsigned)
STAND_IN_MIN_MAX(long, long, long)
STAND_IN_MIN_MAX(unsigned long, unsigned long, unsigned long)
STAND_IN_MIN_MAX(long, unsigned long, unsigned long)
STAND_IN_MIN_MAX(unsigned long, long, unsigned long)
STAND_IN_MIN_MAX(long long, long long, long long)
STAND_IN_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
STAND_IN_MIN_MAX(long long, unsigned long long, unsigned long long)
STAND_IN_MIN_MAX(unsigned long long, long long, unsigned long long)
#undef STAND_IN_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(float a, double b) { return fmin(a, b); }
inline double max(float a, double b) { return fmax(a, b); }
inline double min(double a, float b) { return fmin(a, b); }
inline double max(double a, float b) { return fmax(a, b); }

inline float rsqrtf(float x) { return float(1.0 / sqrt(double(x))); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float rsqrt(float x) { return rsqrtf(x); }
inline float normcdff(float x) { return float(0.5 * erfc(-double(x) * M_SQRT1_2)); }
inline double normcdf(double x) { return 0.5 * erfc(-x * M_SQRT1_2); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double x) { return sqrt(x); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }
// The C library declares functions of these names, so they cannot be functions here.
#define __expf(x) expf(x)
#define __exp10f(x) exp10f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __powf(x, y) powf(x, y)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __tanf(x) tanf(x)
#define __tanhf(x) tanhf(x)

namespace stand_in {
// A float as an integer: what does not fit becomes the nearest that does, NaN becomes 0 (the smallest for 64 bits).
template <typename Integer, typename Float>
Integer rounded(Float value) {
    using limits = std::numeric_limits<Integer>;
    if (value != value) return sizeof(Integer) == 8 ? Integer(1) << 63 : 0;
    if (value <= Float(limits::min())) return limits::min();
    // The greatest integer plus one is a power of two, so it is exact in any float.
    if (value >= Float(std::ldexp(1.0, limits::digits))) return limits::max();
    return Integer(value);
}
}  // namespace stand_in
inline unsigned __float_as_uint(float x) { return stand_in::bits<unsigned>(x); }
inline int __float_as_int(float x) { return stand_in::bits<int>(x); }
inline float __uint_as_float(unsigned x) { return stand_in::bits<float>(x); }
inline float __int_as_float(int x) { return stand_in::bits<float>(x); }
inline long long __double_as_longlong(double x) { return stand_in::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return stand_in::bits<double>(x); }
inline int __float2int_rn(float x) { return stand_in::rounded<int>(nearbyintf(x)); }
inline int __float2int_rz(float x) { return stand_in::rounded<int>(truncf(x)); }
inline int __float2int_rd(float x) { return stand_in::rounded<int>(floorf(x)); }
inline int __float2int_ru(float x) { return stand_in::rounded<int>(ceilf(x)); }
inline unsigned __float2uint_rn(float x) { return stand_in::rounded<unsigned>(nearbyintf(x)); }
inline unsigned __float2uint_rz(float x) { return stand_in::rounded<unsigned>(truncf(x)); }
inline long long __float2ll_rn(float x) { return stand_in::rounded<long long>(nearbyintf(x)); }
inline int __double2int_rn(double x) { return stand_in::rounded<int>(nearbyint(x)); }
inline int __double2int_rz(double x) { return stand_in::rounded<int>(trunc(x)); }
inline long long __double2ll_rn(double x) { return stand_in::rounded<long long>(nearbyint(x)); }
inline float __double2float_rn(double x) { return float(x); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline float __ll2float_rn(long long x) { return float(x); }
inline float __ull2float_rn(unsigned long long x) { return float(x); }
inline double __int2double_rn(int x) { return x; }
inline double __ll2double_rn(long long x) { return double(x); }
inline double __ull2double_rn(unsigned long long x) { return double(x); }
inline double __hiloint2double(int high, int low) {
    return stand_in::bits<double>((unsigned long long)(unsigned(high)) << 32 | unsigned(low));
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)(x)) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
    unsigned reversed = 0;
    for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1) << (31 - bit);
    return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)(a) * b >> 32); }
inline int __mulhi(int a, int b) { return int((long long)(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)(a) * b >> 64);
}
inline int __mul24(int a, int b) { return a * b; }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return unsigned(((unsigned long long)(high) << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return unsigned(((unsigned long long)(high) << 32 | low) >> (shift & 31));
}
// The bytes of (a, b), lowest first, that the four nibbles of `selector` name; a nibble of 8 and more spreads the sign.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const unsigned long long both = (unsigned long long)(b) << 32 | a;
    unsigned result = 0;
    for (int position = 0; position < 4; ++position) {
        const unsigned nibble = selector >> (4 * position) & 15;
        unsigned byte = unsigned(both >> (8 * (nibble & 7))) & 255;
        if (nibble & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << (8 * position);
    }
    return result;
}
inline int __dp4a(int a, int b, int sum) {
    for (int byte = 0; byte < 4; ++byte) sum += int(int8_t(a >> (8 * byte))) * int(int8_t(b >> (8 * byte)));
    return sum;
}

#include "small_floats.h"
