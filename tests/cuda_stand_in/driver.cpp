// The stand-in's libcuda: the driver of one device, whose memory is the computer's own and whose kernels run at once, on
// the thread that launches them. Streams and events are there, but nothing is ever still to be done, except for copies
// from page-locked memory: these are made as late as a device may make them, so that it shows who writes there too early.
//
// What a test may set, in the environment:
//   STAND_IN_DEVICES          0: there is no device
//   STAND_IN_DRIVER_VERSION   such as 12040; 13000 if not set
//   STAND_IN_CAPABILITY       compute capability, such as 9.0; 8.0 if not set
//   STAND_IN_MEMORY           bytes of the device, such as 64M; 16G if not set
//   STAND_IN_FAILURE          number of the one allocation on the device that finds no memory; 0: none, and how many there
//                             were is said at the end
//   STAND_IN_PAGE_LOCKED      0: the system gives no page-locked memory
//   STAND_IN_GUARD            1: an access beyond the end of an allocation stops the program and says where
//   STAND_IN_COUNT            a file that says at the end how often the host had to wait: copies from the device, their bytes, and
//                             calls that wait for all that was launched
//
// Fresh memory holds bytes 0xff (the first MiB of it), and so does freed memory. What is written around an allocation is
// found when it is freed. Copies and products are refused, with a message, if they leave an allocation.

#include <cuda.h>
#include <dlfcn.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "compile.h"

struct CUctx_st {
    int flags = 0;
};
struct CUstream_st {
    int priority = 0;
};
struct CUevent_st {
    bool recorded = false;
    // Copies that were put into streams before it was recorded.
    size_t copies = 0;
    std::chrono::steady_clock::time_point time;
};
struct CUmemPoolHandle_st {
    cuuint64_t release_threshold = 0;
};

namespace {

// As `stand_in::Kernel` in stand_in.h, which is not included here: its macros are not for host code.
struct Kernel {
    const char* name;
    void (*function)();
    void (*call)(void (*)(), void**);
    size_t parameters;
};

}  // namespace

struct CUfunc_st {
    const Kernel* kernel = nullptr;
    CUmodule module = nullptr;
    int most_dynamic_shared_bytes = 48 * 1024;
};

struct CUmod_st {
    void* library = nullptr;
    void (*launch)(const Kernel*, const unsigned*, const unsigned*, unsigned long, void**) = nullptr;
    void (*position)(unsigned*) = nullptr;
    std::map<std::string, std::unique_ptr<CUfunc_st>> functions;
    // Why a module of candle's has no kernels: said when one of them is asked for.
    std::string problem;
};

namespace {

constexpr unsigned char fresh_byte = 0xff;
constexpr unsigned char margin_byte = 0xa5;
constexpr size_t margin_bytes = 256;
constexpr size_t filled_bytes = 1 << 20;

struct Allocation {
    size_t bytes;
    // What to hand back to the system, and how much of it.
    unsigned char* memory;
    size_t memory_bytes;
    bool on_device;
};

struct Copy {
    CUdeviceptr to;
    const void* from;
    size_t bytes;
};

struct Device {
    std::mutex mutex;
    std::map<uintptr_t, Allocation> allocations;
    // Copies from page-locked memory that are still to be made, and how many have been made.
    std::deque<Copy> copies;
    size_t copied = 0;
    size_t used = 0;
    size_t most_used = 0;
    // How many allocations on the device were asked for.
    size_t asked = 0;
    // What the host waited for.
    size_t to_host_copies = 0;
    size_t to_host_bytes = 0;
    size_t synchronisations = 0;
    // What the pool has from the system. It keeps that if it has a threshold, as on a device.
    size_t reserved = 0;
};

// Never destroyed: programs free memory in destructors that may run after this library's.
Device& device = *new Device;
CUctx_st primary_context;
CUmemPoolHandle_st pool;
thread_local CUcontext current_context = nullptr;
thread_local CUfunction running = nullptr;
bool initialised = false;

__attribute__((format(printf, 1, 2))) void complain(const char* format, ...) {
    std::fprintf(stderr, "cuda stand-in: ");
    va_list arguments;
    va_start(arguments, format);
    std::vfprintf(stderr, format, arguments);
    va_end(arguments);
    std::fprintf(stderr, "\n");
}

const char* setting(const char* name) {
    const char* value = std::getenv(name);
    return value && *value ? value : nullptr;
}

size_t memory_limit() {
    const char* value = setting("STAND_IN_MEMORY");
    if (!value) return size_t(16) << 30;
    char* unit = nullptr;
    const size_t number = std::strtoull(value, &unit, 10);
    const int shift = *unit == 'K' ? 10 : *unit == 'M' ? 20 : *unit == 'G' ? 30 : 0;
    return number << shift;
}

// Which allocation on the device fails, counted from 1.
size_t failing_allocation() {
    static const char* const value = setting("STAND_IN_FAILURE");
    static const size_t number = value ? std::strtoull(value, nullptr, 10) : 0;
    return number;
}

bool guarded() {
    static const bool value = setting("STAND_IN_GUARD") && *setting("STAND_IN_GUARD") != '0';
    return value;
}

// Major and minor number.
std::pair<int, int> capability() {
    const char* value = setting("STAND_IN_CAPABILITY");
    int major = 8, minor = 0;
    if (value) std::sscanf(value, "%d.%d", &major, &minor);
    return {major, minor};
}

size_t round_up(size_t bytes, size_t step) { return (bytes + step - 1) / step * step; }

// ---- memory ------------------------------------------------------------------------------------------------------

// Says which thread of which kernel touched what it may not, and lets the program end as it would have.
void report_fault(int signal, siginfo_t* info, void*) {
    char text[256];
    int length;
    if (running) {
        unsigned at[6] = {};
        running->module->position(at);
        length = std::snprintf(text, sizeof text,
                               "cuda stand-in: kernel `%s`, block (%u, %u, %u), thread (%u, %u, %u): access to %p, outside of memory\n",
                               running->kernel->name, at[0], at[1], at[2], at[3], at[4], at[5], info->si_addr);
    } else {
        length = std::snprintf(text, sizeof text, "cuda stand-in: access to %p, outside of memory, by no kernel\n", info->si_addr);
    }
    if (write(2, text, size_t(length)) < 0) _exit(1);
    struct sigaction original = {};
    original.sa_handler = SIG_DFL;
    sigaction(signal, &original, nullptr);
}

void watch_faults() {
    struct sigaction action = {};
    action.sa_sigaction = report_fault;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &action, nullptr);
    sigaction(SIGBUS, &action, nullptr);
}

// Memory for `bytes` with margins around it that nothing may write.
bool make_allocation(size_t bytes, Allocation* made, uintptr_t* address) {
    made->bytes = bytes;
    if (guarded()) {
        // The end lies at a page that cannot be touched, but for what keeps the start a multiple of 16.
        const size_t page = size_t(sysconf(_SC_PAGESIZE));
        const size_t usable = round_up(bytes, page) + page;
        made->memory_bytes = usable + page;
        void* memory = mmap(nullptr, made->memory_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) return false;
        made->memory = static_cast<unsigned char*>(memory);
        mprotect(made->memory + usable, page, PROT_NONE);
        *address = reinterpret_cast<uintptr_t>(made->memory + usable - round_up(bytes, 16));
    } else {
        made->memory_bytes = round_up(bytes, margin_bytes) + 2 * margin_bytes;
        made->memory = static_cast<unsigned char*>(std::aligned_alloc(margin_bytes, made->memory_bytes));
        if (!made->memory) return false;
        *address = reinterpret_cast<uintptr_t>(made->memory + margin_bytes);
    }
    unsigned char* start = reinterpret_cast<unsigned char*>(*address);
    std::memset(start - margin_bytes, margin_byte, margin_bytes);
    std::memset(start, fresh_byte, std::min(bytes, filled_bytes));
    const size_t after = guarded() ? round_up(bytes, 16) - bytes : round_up(bytes, margin_bytes) - bytes + margin_bytes;
    std::memset(start + bytes, margin_byte, after);
    return true;
}

void end_allocation(uintptr_t address, const Allocation& allocation) {
    unsigned char* start = reinterpret_cast<unsigned char*>(address);
    const size_t after = guarded() ? round_up(allocation.bytes, 16) - allocation.bytes
                                   : round_up(allocation.bytes, margin_bytes) - allocation.bytes + margin_bytes;
    const auto changed = [](unsigned char byte) { return byte != margin_byte; };
    const bool before_changed = std::any_of(start - margin_bytes, start, changed);
    if (before_changed || std::any_of(start + allocation.bytes, start + allocation.bytes + after, changed)) {
        complain("something wrote %s an allocation of %zu bytes", before_changed ? "before" : "beyond", allocation.bytes);
        std::abort();
    }
    std::memset(start, fresh_byte, std::min(allocation.bytes, filled_bytes));
    if (guarded()) {
        munmap(allocation.memory, allocation.memory_bytes);
    } else {
        std::free(allocation.memory);
    }
}

// What an allocation takes from the device.
size_t charge(const Allocation& allocation) { return allocation.on_device ? round_up(allocation.bytes, 512) : 0; }

// Makes the copies that are still to be made, up to the one with this number, counted from 1. The lock is held.
void finish_copies(size_t last = SIZE_MAX) {
    for (; !device.copies.empty() && device.copied < last; ++device.copied) {
        const Copy& copy = device.copies.front();
        std::memcpy(reinterpret_cast<void*>(copy.to), copy.from, copy.bytes);
        device.copies.pop_front();
    }
}

void finish() {
    const std::lock_guard<std::mutex> lock(device.mutex);
    finish_copies();
}

// Whether one of the copies up to this number was still to be made: it is not any more.
bool was_behind(size_t last) {
    const std::lock_guard<std::mutex> lock(device.mutex);
    const bool behind = !device.copies.empty() && device.copied < last;
    finish_copies(last);
    return behind;
}

CUresult allocate(size_t bytes, bool on_device, uintptr_t* address) {
    const std::lock_guard<std::mutex> lock(device.mutex);
    Allocation allocation{};
    allocation.bytes = bytes;
    allocation.on_device = on_device;
    if (on_device && ++device.asked == failing_allocation()) return CUDA_ERROR_OUT_OF_MEMORY;
    const size_t limit = memory_limit();
    if (on_device && (bytes > limit || device.used + charge(allocation) > limit)) return CUDA_ERROR_OUT_OF_MEMORY;
    if (!make_allocation(bytes, &allocation, address)) return CUDA_ERROR_OUT_OF_MEMORY;
    device.used += charge(allocation);
    device.most_used = std::max(device.most_used, device.used);
    device.reserved = std::max(device.reserved, device.used);
    device.allocations[*address] = allocation;
    return CUDA_SUCCESS;
}

CUresult release(uintptr_t address, bool on_device, const char* call) {
    if (address == 0) return CUDA_SUCCESS;
    const std::lock_guard<std::mutex> lock(device.mutex);
    const auto found = device.allocations.find(address);
    if (found == device.allocations.end() || found->second.on_device != on_device) {
        complain("`%s` of %#zx, which was not allocated so or is freed already", call, size_t(address));
        return CUDA_ERROR_INVALID_VALUE;
    }
    const auto reads = [&](const Copy& copy) {
        const uintptr_t from = reinterpret_cast<uintptr_t>(copy.from);
        return from >= address && from < address + found->second.bytes;
    };
    if (!on_device && std::any_of(device.copies.begin(), device.copies.end(), reads)) {
        complain("`%s` of memory from which a copy is still to be made", call);
        std::abort();
    }
    finish_copies();
    device.used -= charge(found->second);
    if (pool.release_threshold == 0) device.reserved = device.used;
    end_allocation(address, found->second);
    device.allocations.erase(found);
    return CUDA_SUCCESS;
}

// The most bytes from `address` on that lie in one allocation, on the device or not. The lock is held.
size_t room_at(uintptr_t address, bool* on_device) {
    auto after = device.allocations.upper_bound(address);
    if (after == device.allocations.begin()) return 0;
    --after;
    const uintptr_t end = after->first + after->second.bytes;
    *on_device = after->second.on_device;
    return address < end ? end - address : 0;
}

bool inside(uintptr_t address, size_t bytes, const char* call) {
    const std::lock_guard<std::mutex> lock(device.mutex);
    bool on_device = true;
    const size_t room = room_at(address, &on_device);
    if (bytes <= room) return true;
    complain("`%s`: %zu bytes at %#zx, of which %zu are allocated", call, bytes, size_t(address), room);
    return false;
}

CUresult copy(void* to, const void* from, size_t bytes, uintptr_t on_device, uintptr_t also_on_device, const char* call) {
    if (!current_context) return CUDA_ERROR_INVALID_CONTEXT;
    if (bytes == 0) return CUDA_SUCCESS;
    if (!inside(on_device, bytes, call) || (also_on_device && !inside(also_on_device, bytes, call))) return CUDA_ERROR_INVALID_VALUE;
    finish();
    std::memmove(to, from, bytes);
    return CUDA_SUCCESS;
}

CUresult to_device(CUdeviceptr to, const void* from, size_t bytes, const char* call) {
    return copy(reinterpret_cast<void*>(to), from, bytes, to, 0, call);
}

bool page_locked(const void* from, size_t bytes) {
    const std::lock_guard<std::mutex> lock(device.mutex);
    bool on_device = true;
    return room_at(reinterpret_cast<uintptr_t>(from), &on_device) >= bytes && !on_device;
}

CUresult to_device_later(CUdeviceptr to, const void* from, size_t bytes, const char* call) {
    if (!current_context || bytes == 0 || !page_locked(from, bytes)) return to_device(to, from, bytes, call);
    if (!inside(to, bytes, call)) return CUDA_ERROR_INVALID_VALUE;
    const std::lock_guard<std::mutex> lock(device.mutex);
    device.copies.push_back({to, from, bytes});
    return CUDA_SUCCESS;
}

CUresult to_host(void* to, CUdeviceptr from, size_t bytes, const char* call) {
    {
        const std::lock_guard<std::mutex> lock(device.mutex);
        ++device.to_host_copies;
        device.to_host_bytes += bytes;
    }
    return copy(to, reinterpret_cast<const void*>(from), bytes, from, 0, call);
}

void write_counts() {
    std::FILE* file = std::fopen(setting("STAND_IN_COUNT"), "w");
    if (!file) return complain("`STAND_IN_COUNT` names a file that cannot be written");
    std::fprintf(file, "to_host_copies %zu\nto_host_bytes %zu\nsynchronisations %zu\n", device.to_host_copies, device.to_host_bytes,
                 device.synchronisations);
    std::fclose(file);
}

CUresult within_device(CUdeviceptr to, CUdeviceptr from, size_t bytes, const char* call) {
    return copy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes, to, from, call);
}

template <typename Value>
CUresult fill(CUdeviceptr to, Value value, size_t count, const char* call) {
    if (!current_context) return CUDA_ERROR_INVALID_CONTEXT;
    if (count == 0) return CUDA_SUCCESS;
    if (!inside(to, count * sizeof value, call)) return CUDA_ERROR_INVALID_VALUE;
    finish();
    std::fill_n(reinterpret_cast<Value*>(to), count, value);
    return CUDA_SUCCESS;
}

// ---- modules -----------------------------------------------------------------------------------------------------

CUresult open_library(CUmod_st* module, const std::string& path) {
    module->library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!module->library) {
        complain("%s", dlerror());
        return CUDA_ERROR_INVALID_PTX;
    }
    module->launch = reinterpret_cast<decltype(module->launch)>(dlsym(module->library, "stand_in_launch"));
    module->position = reinterpret_cast<decltype(module->position)>(dlsym(module->library, "stand_in_position"));
    const auto kernels = reinterpret_cast<const Kernel* (*)()>(dlsym(module->library, "stand_in_kernels"));
    if (!module->launch || !module->position || !kernels) return CUDA_ERROR_INVALID_PTX;
    for (const Kernel* kernel = kernels(); kernel->name; ++kernel) {
        auto function = std::make_unique<CUfunc_st>();
        function->kernel = kernel;
        function->module = module;
        module->functions[kernel->name] = std::move(function);
    }
    return CUDA_SUCCESS;
}

CUresult load(CUmodule* module, const std::string& text) {
    if (!current_context) return CUDA_ERROR_INVALID_CONTEXT;
    auto made = std::make_unique<CUmod_st>();
    std::string library = stand_in::library_of_module(text);
    if (library.empty()) {
        if (text.find(".entry ") == std::string::npos) return CUDA_ERROR_INVALID_PTX;
        const stand_in::CompileResult result = stand_in::compile_candle_module(text);
        library = result.library;
        made->problem = result.log;
    }
    if (!library.empty()) {
        const CUresult opened = open_library(made.get(), library);
        if (opened != CUDA_SUCCESS) return opened;
    }
    *module = made.release();
    return CUDA_SUCCESS;
}

// ---- facts -------------------------------------------------------------------------------------------------------

// The most dynamic shared memory that a kernel may ask for.
int most_shared_bytes() { return capability().first >= 9 ? 227 * 1024 : 163 * 1024; }

int attribute(CUdevice_attribute which) {
    switch (which) {
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: return 1024;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: return 64;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: return 0x7fffffff;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: return 65535;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return 48 * 1024;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return most_shared_bytes();
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
        case CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK:
            return which == CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK ? 1024 : most_shared_bytes() + 1024;
        case CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY: return 65536;
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return 32;
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: return 65536;
        case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: return 1000000;
        case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: return 1000000;
        case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: return 64;
        case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: return 1 << 20;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return 1;
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return 2048;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR: return 32;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return capability().first;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return capability().second;
        case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
        case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY:
        case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED: return 1;
        default: return 0;
    }
}

const std::map<int, std::pair<const char*, const char*>> errors = {
    {CUDA_SUCCESS, {"CUDA_SUCCESS", "no error"}},
    {CUDA_ERROR_INVALID_VALUE, {"CUDA_ERROR_INVALID_VALUE", "invalid argument"}},
    {CUDA_ERROR_OUT_OF_MEMORY, {"CUDA_ERROR_OUT_OF_MEMORY", "out of memory"}},
    {CUDA_ERROR_NOT_INITIALIZED, {"CUDA_ERROR_NOT_INITIALIZED", "initialization error"}},
    {CUDA_ERROR_NO_DEVICE, {"CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"}},
    {CUDA_ERROR_INVALID_DEVICE, {"CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"}},
    {CUDA_ERROR_INVALID_CONTEXT, {"CUDA_ERROR_INVALID_CONTEXT", "invalid device context"}},
    {CUDA_ERROR_INVALID_PTX, {"CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"}},
    {CUDA_ERROR_INVALID_HANDLE, {"CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"}},
    {CUDA_ERROR_NOT_FOUND, {"CUDA_ERROR_NOT_FOUND", "named symbol not found"}},
    {CUDA_ERROR_NOT_READY, {"CUDA_ERROR_NOT_READY", "device not ready"}},
    {CUDA_ERROR_NOT_SUPPORTED, {"CUDA_ERROR_NOT_SUPPORTED", "operation not supported"}},
};

bool is_device(CUdevice number) { return initialised && number == 0; }

}  // namespace

// For the stand-in's cuBLAS: whether `bytes` from `address` on, which are about to be used, lie in one allocation; says so
// if not.
extern "C" __attribute__((visibility("default"))) bool cuStandInInside(const void* address, size_t bytes, const char* call) {
    finish();
    return inside(reinterpret_cast<uintptr_t>(address), bytes, call);
}

extern "C" {

CUresult cuInit(unsigned flags) {
    if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
    const char* devices = setting("STAND_IN_DEVICES");
    if (devices && *devices == '0') return CUDA_ERROR_NO_DEVICE;
    static std::once_flag once;
    std::call_once(once, [] {
        if (guarded()) watch_faults();
        if (setting("STAND_IN_FAILURE") && failing_allocation() == 0) {
            std::atexit([] { complain("%zu allocations", device.asked); });
        }
        if (setting("STAND_IN_COUNT")) std::atexit(write_counts);
        initialised = true;
    });
    return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version) {
    const char* value = setting("STAND_IN_DRIVER_VERSION");
    *version = value ? std::atoi(value) : 13000;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char** name) {
    const auto found = errors.find(error);
    *name = found == errors.end() ? "an error that the stand-in never gives" : found->second.first;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
    const auto found = errors.find(error);
    *text = found == errors.end() ? "an error that the stand-in never gives" : found->second.second;
    return CUDA_SUCCESS;
}

// ---- device and context ------------------------------------------------------------------------------------------

CUresult cuDeviceGetCount(int* count) {
    if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
    *count = 1;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* found, int ordinal) {
    if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
    if (ordinal != 0) return CUDA_ERROR_INVALID_DEVICE;
    *found = 0;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char* name, int length, CUdevice number) {
    if (!is_device(number)) return CUDA_ERROR_INVALID_DEVICE;
    std::snprintf(name, size_t(length), "CUDA stand-in");
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice number) {
    if (!is_device(number)) return CUDA_ERROR_INVALID_DEVICE;
    std::memcpy(uuid->bytes, "CUDA stand-in 00", sizeof uuid->bytes);
    return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice number) {
    if (!is_device(number)) return CUDA_ERROR_INVALID_DEVICE;
    *bytes = memory_limit();
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice number) {
    if (!is_device(number)) return CUDA_ERROR_INVALID_DEVICE;
    *value = attribute(which);
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice number) {
    if (!is_device(number)) return CUDA_ERROR_INVALID_DEVICE;
    *context = &primary_context;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice number) { return is_device(number) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE; }

CUresult cuCtxGetCurrent(CUcontext* context) {
    if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
    *context = current_context;
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
    if (context && context != &primary_context) return CUDA_ERROR_INVALID_CONTEXT;
    current_context = context;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* number) {
    if (!current_context) return CUDA_ERROR_INVALID_CONTEXT;
    *number = 0;
    return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize() {
    finish();
    {
        const std::lock_guard<std::mutex> lock(device.mutex);
        ++device.synchronisations;
    }
    return current_context ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

CUresult cuCtxSetFlags(unsigned flags) {
    if (!current_context) return CUDA_ERROR_INVALID_CONTEXT;
    current_context->flags = int(flags);
    return CUDA_SUCCESS;
}

CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = 0;
    return current_context ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

// ---- streams and events ------------------------------------------------------------------------------------------

CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned, int priority) {
    if (!current_context) return CUDA_ERROR_INVALID_CONTEXT;
    *stream = new CUstream_st;
    (*stream)->priority = priority;
    return CUDA_SUCCESS;
}

CUresult cuStreamCreate(CUstream* stream, unsigned flags) { return cuStreamCreateWithPriority(stream, flags, 0); }

CUresult cuStreamDestroy_v2(CUstream stream) {
    if (reinterpret_cast<uintptr_t>(stream) <= 2) return CUDA_ERROR_INVALID_HANDLE;
    delete stream;
    return CUDA_SUCCESS;
}

CUresult cuStreamSynchronize(CUstream) { return cuCtxSynchronize(); }

CUresult cuStreamQuery(CUstream) {
    if (!current_context) return CUDA_ERROR_INVALID_CONTEXT;
    return was_behind(SIZE_MAX) ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS;
}

CUresult cuStreamWaitEvent(CUstream, CUevent event, unsigned) { return event ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE; }

CUresult cuStreamIsCapturing(CUstream, CUstreamCaptureStatus* status) {
    *status = CU_STREAM_CAPTURE_STATUS_NONE;
    return CUDA_SUCCESS;
}

CUresult cuLaunchHostFunc(CUstream, CUhostFn function, void* data) {
    if (!current_context) return CUDA_ERROR_INVALID_CONTEXT;
    finish();
    function(data);
    return CUDA_SUCCESS;
}

CUresult cuEventCreate(CUevent* event, unsigned) {
    if (!current_context) return CUDA_ERROR_INVALID_CONTEXT;
    *event = new CUevent_st;
    return CUDA_SUCCESS;
}

CUresult cuEventDestroy_v2(CUevent event) {
    if (!event) return CUDA_ERROR_INVALID_HANDLE;
    delete event;
    return CUDA_SUCCESS;
}

CUresult cuEventRecord(CUevent event, CUstream) {
    if (!event) return CUDA_ERROR_INVALID_HANDLE;
    const std::lock_guard<std::mutex> lock(device.mutex);
    event->recorded = true;
    event->copies = device.copied + device.copies.size();
    event->time = std::chrono::steady_clock::now();
    return CUDA_SUCCESS;
}

CUresult cuEventSynchronize(CUevent event) {
    if (!event) return CUDA_ERROR_INVALID_HANDLE;
    was_behind(event->copies);
    return CUDA_SUCCESS;
}

CUresult cuEventQuery(CUevent event) {
    if (!event) return CUDA_ERROR_INVALID_HANDLE;
    return was_behind(event->copies) ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS;
}

CUresult cuEventElapsedTime_v2(float* milliseconds, CUevent start, CUevent end) {
    if (!start || !end || !start->recorded || !end->recorded) return CUDA_ERROR_INVALID_HANDLE;
    *milliseconds = std::chrono::duration<float, std::milli>(end->time - start->time).count();
    return CUDA_SUCCESS;
}

#undef cuEventElapsedTime
CUresult cuEventElapsedTime(float* milliseconds, CUevent start, CUevent end) {
    return cuEventElapsedTime_v2(milliseconds, start, end);
}

// ---- memory ------------------------------------------------------------------------------------------------------

CUresult cuMemAlloc_v2(CUdeviceptr* pointer, size_t bytes) {
    if (!current_context) return CUDA_ERROR_INVALID_CONTEXT;
    if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    uintptr_t address = 0;
    const CUresult result = allocate(bytes, true, &address);
    *pointer = address;
    return result;
}

CUresult cuMemFree_v2(CUdeviceptr pointer) {
    if (!current_context) return CUDA_ERROR_INVALID_CONTEXT;
    return release(pointer, true, "cuMemFree");
}

CUresult cuMemAllocAsync(CUdeviceptr* pointer, size_t bytes, CUstream) {
    if (!current_context) return CUDA_ERROR_INVALID_CONTEXT;
    *pointer = 0;
    if (bytes == 0) return CUDA_SUCCESS;
    uintptr_t address = 0;
    const CUresult result = allocate(bytes, true, &address);
    *pointer = address;
    return result;
}

CUresult cuMemFreeAsync(CUdeviceptr pointer, CUstream) {
    if (!current_context) return CUDA_ERROR_INVALID_CONTEXT;
    return release(pointer, true, "cuMemFreeAsync");
}

CUresult cuMemAllocFromPoolAsync(CUdeviceptr* pointer, size_t bytes, CUmemoryPool, CUstream stream) {
    return cuMemAllocAsync(pointer, bytes, stream);
}

CUresult cuMemHostAlloc(void** pointer, size_t bytes, unsigned flags) {
    const unsigned known = CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP | CU_MEMHOSTALLOC_WRITECOMBINED;
    if (!current_context) return CUDA_ERROR_INVALID_CONTEXT;
    if (bytes == 0 || (flags & ~known)) return CUDA_ERROR_INVALID_VALUE;
    const char* given = setting("STAND_IN_PAGE_LOCKED");
    if (given && *given == '0') return CUDA_ERROR_OUT_OF_MEMORY;
    uintptr_t address = 0;
    const CUresult result = allocate(bytes, false, &address);
    *pointer = reinterpret_cast<void*>(address);
    return result;
}

CUresult cuMemAllocHost_v2(void** pointer, size_t bytes) { return cuMemHostAlloc(pointer, bytes, 0); }

CUresult cuMemFreeHost(void* pointer) { return release(reinterpret_cast<uintptr_t>(pointer), false, "cuMemFreeHost"); }

CUresult cuMemHostRegister_v2(void*, size_t, unsigned) { return CUDA_SUCCESS; }

CUresult cuMemHostUnregister(void*) { return CUDA_SUCCESS; }

CUresult cuMemGetInfo_v2(size_t* available, size_t* total) {
    if (!current_context) return CUDA_ERROR_INVALID_CONTEXT;
    const std::lock_guard<std::mutex> lock(device.mutex);
    *total = memory_limit();
    *available = *total - std::min(*total, device.reserved);
    return CUDA_SUCCESS;
}

CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) { return to_device(to, from, bytes, "cuMemcpyHtoD"); }
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, CUstream) {
    return to_device_later(to, from, bytes, "cuMemcpyHtoDAsync");
}
CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) { return to_host(to, from, bytes, "cuMemcpyDtoH"); }
CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, CUstream) {
    return to_host(to, from, bytes, "cuMemcpyDtoHAsync");
}
CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) { return within_device(to, from, bytes, "cuMemcpyDtoD"); }
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream) {
    return within_device(to, from, bytes, "cuMemcpyDtoDAsync");
}
CUresult cuMemcpyPeerAsync(CUdeviceptr to, CUcontext, CUdeviceptr from, CUcontext, size_t bytes, CUstream) {
    return within_device(to, from, bytes, "cuMemcpyPeerAsync");
}

CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t count) { return fill(to, value, count, "cuMemsetD8"); }
CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, CUstream) {
    return fill(to, value, count, "cuMemsetD8Async");
}
CUresult cuMemsetD16_v2(CUdeviceptr to, unsigned short value, size_t count) { return fill(to, value, count, "cuMemsetD16"); }
CUresult cuMemsetD16Async(CUdeviceptr to, unsigned short value, size_t count, CUstream) {
    return fill(to, value, count, "cuMemsetD16Async");
}
CUresult cuMemsetD32_v2(CUdeviceptr to, unsigned value, size_t count) { return fill(to, value, count, "cuMemsetD32"); }
CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, CUstream) {
    return fill(to, value, count, "cuMemsetD32Async");
}

CUresult cuDeviceGetDefaultMemPool(CUmemoryPool* found, CUdevice number) {
    if (!is_device(number)) return CUDA_ERROR_INVALID_DEVICE;
    *found = &pool;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetMemPool(CUmemoryPool* found, CUdevice number) { return cuDeviceGetDefaultMemPool(found, number); }

CUresult cuDeviceSetMemPool(CUdevice number, CUmemoryPool chosen) {
    return is_device(number) && chosen == &pool ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemPoolGetAttribute(CUmemoryPool asked, CUmemPool_attribute which, void* value) {
    if (asked != &pool) return CUDA_ERROR_INVALID_VALUE;
    const std::lock_guard<std::mutex> lock(device.mutex);
    switch (which) {
        case CU_MEMPOOL_ATTR_RELEASE_THRESHOLD: *static_cast<cuuint64_t*>(value) = pool.release_threshold; break;
        case CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT: *static_cast<cuuint64_t*>(value) = device.reserved; break;
        case CU_MEMPOOL_ATTR_USED_MEM_CURRENT: *static_cast<cuuint64_t*>(value) = device.used; break;
        case CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH:
        case CU_MEMPOOL_ATTR_USED_MEM_HIGH: *static_cast<cuuint64_t*>(value) = device.most_used; break;
        default: *static_cast<int*>(value) = 1;
    }
    return CUDA_SUCCESS;
}

CUresult cuMemPoolSetAttribute(CUmemoryPool asked, CUmemPool_attribute which, void* value) {
    if (asked != &pool) return CUDA_ERROR_INVALID_VALUE;
    const std::lock_guard<std::mutex> lock(device.mutex);
    switch (which) {
        case CU_MEMPOOL_ATTR_RELEASE_THRESHOLD: pool.release_threshold = *static_cast<cuuint64_t*>(value); break;
        case CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH:
        case CU_MEMPOOL_ATTR_USED_MEM_HIGH: device.most_used = device.used; break;
        default: break;
    }
    return CUDA_SUCCESS;
}

CUresult cuMemPoolTrimTo(CUmemoryPool asked, size_t bytes) {
    if (asked != &pool) return CUDA_ERROR_INVALID_VALUE;
    const std::lock_guard<std::mutex> lock(device.mutex);
    device.reserved = std::max(device.used, std::min(device.reserved, bytes));
    return CUDA_SUCCESS;
}

// ---- modules and kernels -----------------------------------------------------------------------------------------

CUresult cuModuleLoadData(CUmodule* module, const void* image) { return load(module, static_cast<const char*>(image)); }

CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned, CUjit_option*, void**) {
    return load(module, static_cast<const char*>(image));
}

CUresult cuModuleLoad(CUmodule* module, const char* path) {
    std::FILE* file = std::fopen(path, "rb");
    if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
    std::string text;
    for (int letter; (letter = std::fgetc(file)) != EOF;) text += char(letter);
    std::fclose(file);
    return load(module, text);
}

// The library stays: another module may have it open, and it holds the stacks of threads.
CUresult cuModuleUnload(CUmodule module) {
    if (!module) return CUDA_ERROR_INVALID_HANDLE;
    delete module;
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    if (!module) return CUDA_ERROR_INVALID_HANDLE;
    const auto found = module->functions.find(name);
    if (found == module->functions.end()) {
        complain("no kernel `%s`%s%s", name, module->problem.empty() ? "" : ":\n", module->problem.c_str());
        return CUDA_ERROR_NOT_FOUND;
    }
    *function = found->second.get();
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction function) {
    if (!function) return CUDA_ERROR_INVALID_HANDLE;
    switch (which) {
        case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
        case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = 32; break;
        case CU_FUNC_ATTRIBUTE_PTX_VERSION:
        case CU_FUNC_ATTRIBUTE_BINARY_VERSION: *value = capability().first * 10 + capability().second; break;
        case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: *value = function->most_dynamic_shared_bytes; break;
        default: *value = 0;
    }
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
    if (!function) return CUDA_ERROR_INVALID_HANDLE;
    if (which == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
        if (value < 0 || value > most_shared_bytes()) return CUDA_ERROR_INVALID_VALUE;
        function->most_dynamic_shared_bytes = value;
    }
    return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                        unsigned block_z, unsigned shared_bytes, CUstream, void** parameters, void** extra) {
    if (!current_context) return CUDA_ERROR_INVALID_CONTEXT;
    if (!function) return CUDA_ERROR_INVALID_HANDLE;
    if (extra) return CUDA_ERROR_NOT_SUPPORTED;
    const size_t threads = size_t(block_x) * block_y * block_z;
    if (grid_x == 0 || grid_y == 0 || grid_z == 0 || grid_x > 0x7fffffff || grid_y > 65535 || grid_z > 65535 || threads == 0 ||
        threads > 1024 || block_z > 64 || shared_bytes > unsigned(function->most_dynamic_shared_bytes)) {
        complain("kernel `%s` cannot be launched with (%u, %u, %u) blocks of (%u, %u, %u) threads and %u bytes of shared memory",
                 function->kernel->name, grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes);
        return CUDA_ERROR_INVALID_VALUE;
    }
    const unsigned grid[3] = {grid_x, grid_y, grid_z};
    const unsigned block[3] = {block_x, block_y, block_z};
    finish();
    running = function;
    function->module->launch(function->kernel, grid, block, shared_bytes, parameters);
    running = nullptr;
    return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, CUfunction, int threads, size_t, unsigned) {
    if (threads <= 0) return CUDA_ERROR_INVALID_VALUE;
    *blocks = std::min(2048 / threads, 32);
    return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction function, int threads, size_t shared_bytes) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared_bytes, 0);
}

CUresult cuProfilerStart() { return CUDA_SUCCESS; }

CUresult cuProfilerStop() { return CUDA_SUCCESS; }

}  // extern "C"
