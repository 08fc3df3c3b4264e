// Enough of CUDA to run csrc/routing.cu on a CPU: every thread of a block is a fiber, blocks run one after another.
// A collective of a warp waits for all 32 lanes, a barrier for all threads that have not returned; when nobody can go
// on, the process ends with a line. Shared variables keep what the last block left in them, as on a device.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

using std::max;
using std::min;

using cudaStream_t = void *;
using cudaError_t = int;
constexpr int cudaSuccess = 0, cudaErrorInvalidValue = 1;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char *cudaGetErrorString(cudaError_t) { return "invalid argument"; }

struct Index {
    unsigned x;
};
inline Index threadIdx, blockIdx, blockDim;

namespace emulator {

constexpr int kLanes = 32;
constexpr size_t kStack = 64 * 1024;

struct Gate {  // opens when as many as expected have come
    int came = 0;
    unsigned turn = 0;
};

struct Warp {
    Gate gate;
    uint64_t slots[2][kLanes];
};

struct Fiber {
    ucontext_t context;
    bool done = false;
};

inline std::vector<Fiber> fibers;
inline std::vector<char> stacks, dynamic;
inline std::vector<Warp> warps;
inline Gate block_gate;
inline ucontext_t scheduler;
inline unsigned running;
inline int alive;
inline bool progress;
inline std::function<void()> body;

[[noreturn]] inline void fail(const char *what) {
    std::fprintf(stderr, "emulator: block %u, thread %u: %s\n", blockIdx.x, running, what);
    std::abort();
}

inline void yield() { swapcontext(&fibers[running].context, &scheduler); }

inline void pass(Gate &gate, const int &expected) {
    const unsigned turn = gate.turn;
    ++gate.came;
    progress = true;
    while (gate.turn == turn) {
        if (gate.came >= expected) {
            gate.came = 0;
            ++gate.turn;
            progress = true;
            return;
        }
        yield();
    }
}

// What every lane of the warp gave.
inline const uint64_t *exchange(unsigned mask, uint64_t value) {
    static const int lanes = kLanes;
    if (mask != 0xffffffffu) fail("a collective of less than a warp");
    Warp &warp = warps[threadIdx.x / kLanes];
    uint64_t *slots = warp.slots[warp.gate.turn % 2];
    slots[threadIdx.x % kLanes] = value;
    pass(warp.gate, lanes);
    return slots;
}

inline void entry() {
    body();
    fibers[running].done = true;
    --alive;
    progress = true;
    swapcontext(&fibers[running].context, &scheduler);
}

inline void run_block(unsigned threads) {
    fibers.assign(threads, Fiber{});
    warps.assign(threads / kLanes, Warp{});
    stacks.resize(threads * kStack);
    block_gate = Gate{};
    alive = static_cast<int>(threads);
    for (unsigned i = 0; i < threads; ++i) {
        ucontext_t &context = fibers[i].context;
        getcontext(&context);
        context.uc_stack.ss_sp = stacks.data() + i * kStack;
        context.uc_stack.ss_size = kStack;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
    while (alive > 0) {
        progress = false;
        for (unsigned i = 0; i < threads; ++i) {
            if (fibers[i].done) continue;
            running = threadIdx.x = i;
            swapcontext(&scheduler, &fibers[i].context);
        }
        if (!progress) fail("nobody can go on: threads wait at different places");
    }
}

template <class Kernel>
struct Launch {
    Kernel kernel;
    int blocks, threads;
    size_t shared;

    template <class... Arguments>
    void operator()(Arguments... arguments) const {
        if (threads % kLanes != 0 || threads > 1024 || shared > 48 * 1024) fail("a launch that a device refuses");
        dynamic.assign(shared, '\x7f');
        blockDim.x = static_cast<unsigned>(threads);
        body = [&] { kernel(arguments...); };
        for (blockIdx.x = 0; blockIdx.x < static_cast<unsigned>(blocks); ++blockIdx.x) run_block(blockDim.x);
    }
};

template <class Kernel>
Launch<Kernel> launch(Kernel kernel, int blocks, int threads, size_t shared, cudaStream_t) {
    return {kernel, blocks, threads, shared};
}

}  // namespace emulator

inline void __syncthreads() { emulator::pass(emulator::block_gate, emulator::alive); }
inline void __syncwarp() { emulator::exchange(~0u, 0); }

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = emulator::exchange(mask, bits)[lane];
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int step) {
    return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ step);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int step) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    return __shfl_sync(mask, value, lane < step ? lane : lane - step);
}

inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
    const uint64_t *all = emulator::exchange(mask, value);
    return static_cast<unsigned>(*std::max_element(all, all + 32));
}

inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
    const uint64_t *all = emulator::exchange(mask, value);
    return static_cast<unsigned>(*std::min_element(all, all + 32));
}

inline unsigned __match_any_sync(unsigned mask, int value) {
    const uint64_t *all = emulator::exchange(mask, static_cast<unsigned>(value));
    unsigned equal = 0;
    for (int lane = 0; lane < 32; ++lane) equal |= static_cast<unsigned>(all[lane] == static_cast<unsigned>(value)) << lane;
    return equal;
}

template <class T>
T atomicOr(T *at, T value) {
    const T old = *at;
    *at |= value;
    return old;
}

template <class T>
T atomicAdd(T *at, T value) {
    const T old = *at;
    *at += value;
    return old;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }

inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
