// Routing of tokens to experts: the k best of E scores, and where each slot lies in expert-major order.
//
// Plain C interface on raw pointers and a stream, no torch headers; built by CMake when UNIMEGA_BUILD=cuda. A route is
// three launches, without atomics on global memory and without a sync over the grid; the choice alone is the first:
//   choose  a warp a token: k times the largest key of the row; how often each block of tokens chose each expert
//   scan    a warp an expert: running sum of those counts over the blocks
//   place   a thread a slot: start of its expert + blocks before + slots before it in its block
// The order is stable and does not depend on scheduling. Ties go to the lowest expert.
//
// Limits: 1 <= experts <= 512, 1 <= k <= 16.

#include <cuda_runtime.h>

#include <cfloat>
#include <cstdint>

namespace {

constexpr int kLanes = 32;
constexpr int kWarps = 8;
constexpr int kTokens = 64;  // of a block
constexpr int kMaxExperts = 512;
constexpr int kMaxK = 16;
constexpr unsigned kAll = 0xffffffffu;

// Order-preserving map of floats to unsigned; -0 and +0 are equal. 0 stays free: it means that there is no candidate,
// and a NaN must not, or a token would have one expert twice.
__device__ __forceinline__ unsigned ordered(float x) {
    const unsigned bits = __float_as_uint(x + 0.0f);
    return (bits & 0x80000000u) ? max(~bits, 1u) : bits | 0x80000000u;
}

__device__ __forceinline__ float warp_max(float x) {
    for (int step = kLanes / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, step));
    return x;
}

__device__ __forceinline__ float warp_sum(float x) {
    for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAll, x, step);
    return x;
}

// The largest key of the warp's row, and the lowest expert that has it. One reduction for the key, one for the tie.
__device__ __forceinline__ int warp_argmax(unsigned key, int expert, unsigned *largest) {
#if __CUDA_ARCH__ >= 800
    *largest = __reduce_max_sync(kAll, key);
    return static_cast<int>(__reduce_min_sync(kAll, key == *largest ? static_cast<unsigned>(expert) : kAll));
#else
    unsigned top = key;
    for (int step = kLanes / 2; step > 0; step /= 2) top = max(top, __shfl_xor_sync(kAll, top, step));
    unsigned who = key == top ? static_cast<unsigned>(expert) : kAll;
    for (int step = kLanes / 2; step > 0; step /= 2) who = min(who, __shfl_xor_sync(kAll, who, step));
    *largest = top;
    return static_cast<int>(who);
#endif
}

struct Choice {
    int experts, k, groups, group_topk;
    bool sigmoid, normalize;
    float scale;
};

// Blank the keys of experts whose group is not among the best: a group's score is the sum of its two largest keys
// (sigmoid) or its largest (softmax). keys: [experts] in shared memory, of this warp.
__device__ __forceinline__ void limit_groups(float *keys, float *scores, const Choice &c, int lane) {
    const int size = c.experts / c.groups;
    for (int g = lane; g < c.groups; g += kLanes) {
        float first = -INFINITY, second = -INFINITY;
        for (int e = g * size; e < (g + 1) * size; ++e) {
            const float x = keys[e];
            if (x > first) {
                second = first;
                first = x;
            } else if (x > second) {
                second = x;
            }
        }
        scores[g] = c.sigmoid && size > 1 ? first + second : first;
    }
    __syncwarp();
    for (int g = lane; g < c.groups; g += kLanes) {
        int better = 0;  // groups that come before this one
        for (int other = 0; other < c.groups; ++other)
            better += scores[other] > scores[g] || (scores[other] == scores[g] && other < g);
        if (better >= c.group_topk)
            for (int e = g * size; e < (g + 1) * size; ++e) keys[e] = -INFINITY;
    }
    __syncwarp();
}

template <int kPerLane>
__global__ void __launch_bounds__(kWarps *kLanes, 2)
    choose(const float *__restrict__ logits, const float *__restrict__ bias, int64_t tokens, int64_t rows, Choice c,
           float *__restrict__ weights, int *__restrict__ chosen, int *__restrict__ counts, int blocks) {
    extern __shared__ float scratch[];  // keys [kWarps][experts], group scores [kWarps][groups]: with groups only
    __shared__ int tally[kPerLane * kLanes];  // a sum does not depend on the order of its atomics
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    for (int e = threadIdx.x; e < c.experts; e += blockDim.x) tally[e] = 0;
    __syncthreads();
    for (int inside = warp; inside < kTokens; inside += kWarps) {
        const int64_t token = static_cast<int64_t>(blockIdx.x) * kTokens + inside;
        if (token >= tokens) break;
        if (token >= rows) {  // pads are last and have no expert
            for (int j = lane; j < c.k; j += kLanes) {
                chosen[token * c.k + j] = c.experts;
                weights[token * c.k + j] = 0.0f;
            }
            continue;
        }
        float score[kPerLane], key[kPerLane];
        float top = -INFINITY;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            const int e = i * kLanes + lane;
            score[i] = e < c.experts ? logits[token * c.experts + e] : -INFINITY;
            top = fmaxf(top, score[i]);
        }
        float total = 1.0f;
        if (!c.sigmoid) {
            top = warp_max(top);
            total = 0.0f;
        }
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            const int e = i * kLanes + lane;
            const float logit = score[i];
            score[i] = c.sigmoid ? 1.0f / (1.0f + expf(-logit)) : expf(logit - top);
            if (!c.sigmoid) total += score[i];
            // Softmax keeps the order of its logits; what may not be chosen (-inf) stays below every other key.
            key[i] = !c.sigmoid && bias == nullptr ? logit : logit == -INFINITY ? -INFINITY : score[i];
            if (e >= c.experts) key[i] = -INFINITY;
        }
        if (!c.sigmoid) total = warp_sum(total);
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            const int e = i * kLanes + lane;
            if (!c.sigmoid) score[i] /= total;
            if (bias != nullptr && e < c.experts && key[i] != -INFINITY) key[i] = score[i] + bias[e];
        }
        if (c.groups > 1) {
            float *keys = scratch + warp * (c.experts + c.groups);
#pragma unroll
            for (int i = 0; i < kPerLane; ++i)
                if (i * kLanes + lane < c.experts) keys[i * kLanes + lane] = key[i];
            __syncwarp();
            limit_groups(keys, keys + c.experts, c, lane);
#pragma unroll
            for (int i = 0; i < kPerLane; ++i)
                if (i * kLanes + lane < c.experts) key[i] = keys[i * kLanes + lane];
        }
        float mine = 0.0f, sum = 0.0f;  // lane j keeps the j-th choice
        int expert = 0;
        unsigned taken = 0;  // bit i: this lane's i-th expert was chosen
        for (int j = 0; j < c.k; ++j) {
            unsigned best = 0;
            int at = 0;
            float value = 0.0f;  // carried along: an array indexed by a variable would live in memory
#pragma unroll
            for (int i = 0; i < kPerLane; ++i) {
                const bool free = !(taken >> i & 1u) && i * kLanes + lane < c.experts;
                const unsigned candidate = free ? ordered(key[i]) : 0u;
                if (candidate > best) {
                    best = candidate;
                    at = i;
                    value = score[i];
                }
            }
            unsigned largest;
            const int winner = warp_argmax(best, at * kLanes + lane, &largest);
            const int owner = winner % kLanes;
            value = __shfl_sync(kAll, value, owner);
            if (lane == owner) taken |= 1u << (winner / kLanes);
            if (lane == j) {
                mine = value;
                expert = winner;
            }
            sum += value;
        }
        if (lane < c.k) {
            const float norm = c.normalize ? mine / (c.sigmoid ? sum + 1e-20f : sum) : mine;
            weights[token * c.k + lane] = norm * c.scale;
            chosen[token * c.k + lane] = expert;
            atomicAdd(&tally[expert], 1);
        }
    }
    __syncthreads();
    if (counts != nullptr)
        for (int e = threadIdx.x; e < c.experts; e += blockDim.x)
            counts[static_cast<int64_t>(e) * blocks + blockIdx.x] = tally[e];
}

// The same counts, of experts that were chosen elsewhere.
__global__ void count(const int *__restrict__ chosen, int64_t tokens, int experts, int k, int *__restrict__ counts,
                      int blocks) {
    __shared__ int tally[kMaxExperts];
    for (int e = threadIdx.x; e < experts; e += blockDim.x) tally[e] = 0;
    __syncthreads();
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kTokens;
    const int slots = static_cast<int>(min(static_cast<int64_t>(kTokens), tokens - first)) * k;
    for (int slot = threadIdx.x; slot < slots; slot += blockDim.x) {
        const int e = chosen[first * k + slot];
        if (e >= 0 && e < experts) atomicAdd(&tally[e], 1);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < experts; e += blockDim.x)
        counts[static_cast<int64_t>(e) * blocks + blockIdx.x] = tally[e];
}

// counts [experts][blocks] becomes the sum over earlier blocks; totals [experts].
__global__ void scan(int *__restrict__ counts, int *__restrict__ totals, int experts, int blocks) {
    const int expert = (blockIdx.x * blockDim.x + threadIdx.x) / kLanes, lane = threadIdx.x % kLanes;
    if (expert >= experts) return;
    int *row = counts + static_cast<int64_t>(expert) * blocks;
    int before = 0;
    for (int first = 0; first < blocks; first += kLanes) {
        const int b = first + lane;
        const int own = b < blocks ? row[b] : 0;
        int sum = own;
        for (int step = 1; step < kLanes; step *= 2) {
            const int other = __shfl_up_sync(kAll, sum, step);
            if (lane >= step) sum += other;
        }
        if (b < blocks) row[b] = before + sum - own;
        before += __shfl_sync(kAll, sum, kLanes - 1);
    }
    if (lane == 0) totals[expert] = before;
}

// A warp takes a run of the block's slots, 32 at a time, and counts them by expert as it goes; slots without an expert
// are those of one more. What earlier warps of the block counted is added afterwards.
__global__ void __launch_bounds__(kWarps *kLanes, 2)
    place(const int *__restrict__ chosen, const int *__restrict__ before, const int *__restrict__ totals, int64_t tokens,
          int experts, int k, int blocks, int *__restrict__ offsets, int *__restrict__ places, int *__restrict__ source) {
    constexpr int kSteps = kTokens * kMaxK / (kWarps * kLanes);
    __shared__ int tally[kWarps][kMaxExperts + 1];
    __shared__ int starts[kMaxExperts + 1];  // of this block's slots
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    for (int e = lane; e <= experts; e += kLanes) tally[warp][e] = 0;
    if (warp == 0) {  // running sum of the experts' totals
        int sum = 0;
        int mine = 0;  // slots with an expert in earlier blocks
        for (int first = 0; first < experts; first += kLanes) {
            const int e = first + lane;
            const int own = e < experts ? totals[e] : 0;
            int running = own;
            for (int step = 1; step < kLanes; step *= 2) {
                const int other = __shfl_up_sync(kAll, running, step);
                if (lane >= step) running += other;
            }
            if (e < experts) {
                const int earlier = before[static_cast<int64_t>(e) * blocks + blockIdx.x];
                starts[e] = sum + running - own + earlier;
                if (blockIdx.x == 0) offsets[e] = sum + running - own;
                mine += earlier;
            }
            sum += __shfl_sync(kAll, running, kLanes - 1);
        }
        for (int step = kLanes / 2; step > 0; step /= 2) mine += __shfl_xor_sync(kAll, mine, step);
        if (lane == 0) {
            starts[experts] = sum + static_cast<int>(blockIdx.x) * kTokens * k - mine;
            if (blockIdx.x == 0) offsets[experts] = sum;
        }
    }
    __syncwarp();
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kTokens;
    const int slots = static_cast<int>(min(static_cast<int64_t>(kTokens), tokens - first)) * k;
    const int run = kTokens * k / kWarps;
    int expert[kSteps], rank[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
        const int inside = i * kLanes + lane, slot = warp * run + inside;
        expert[i] = -1;
        rank[i] = 0;
        if (i * kLanes >= run) continue;  // for all lanes
        if (inside < run && slot < slots) {
            const int e = chosen[first * k + slot];
            expert[i] = e >= 0 && e < experts ? e : experts;
        }
        const unsigned same = __match_any_sync(kAll, expert[i]);
        const int ahead = __popc(same & ((1u << lane) - 1));
        const int seen = expert[i] < 0 ? 0 : tally[warp][expert[i]];
        rank[i] = seen + ahead;
        __syncwarp();
        if (expert[i] >= 0 && ahead == 0) tally[warp][expert[i]] = seen + __popc(same);
        __syncwarp();
    }
    __syncthreads();
    for (int e = threadIdx.x; e <= experts; e += blockDim.x) {
        int at = starts[e];
        for (int w = 0; w < kWarps; ++w) {
            const int own = tally[w][e];
            tally[w][e] = at;
            at += own;
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
        if (expert[i] < 0) continue;
        const int at = tally[warp][expert[i]] + rank[i];
        const int64_t slot = first * k + warp * run + i * kLanes + lane;
        places[slot] = at;
        source[at] = static_cast<int>(slot);
    }
}

int blocks_of(int64_t tokens) { return static_cast<int>((tokens + kTokens - 1) / kTokens); }

cudaError_t order(const int *chosen, int64_t tokens, int experts, int k, int *counts, int *offsets, int *places,
                  int *source, cudaStream_t stream) {
    const int blocks = blocks_of(tokens);
    int *totals = counts + static_cast<int64_t>(experts) * blocks;
    scan<<<(experts + kWarps - 1) / kWarps, kWarps * kLanes, 0, stream>>>(counts, totals, experts, blocks);
    place<<<blocks, kWarps * kLanes, 0, stream>>>(chosen, counts, totals, tokens, experts, k, blocks, offsets, places, source);
    return cudaGetLastError();
}

bool unfit(int64_t tokens, int experts, int k) {
    return tokens < 1 || experts < 1 || experts > kMaxExperts || k < 1 || k > kMaxK;
}

// counts: null where nobody needs them.
cudaError_t choice(const float *logits, const float *bias, int64_t tokens, int64_t rows, const Choice &c, float *weights,
                   int *chosen, int *counts, cudaStream_t stream) {
    if (unfit(tokens, c.experts, c.k) || c.k > c.experts || c.groups < 1 || c.experts % c.groups != 0)
        return cudaErrorInvalidValue;
    const int blocks = blocks_of(tokens);
    const size_t shared = c.groups > 1 ? sizeof(float) * kWarps * (c.experts + c.groups) : 0;
    auto launch = [&](auto kernel) {
        kernel<<<blocks, kWarps * kLanes, shared, stream>>>(logits, bias, tokens, rows, c, weights, chosen, counts, blocks);
    };
    if (c.experts <= 32) launch(choose<1>);
    else if (c.experts <= 64) launch(choose<2>);
    else if (c.experts <= 128) launch(choose<4>);
    else if (c.experts <= 256) launch(choose<8>);
    else launch(choose<16>);
    return cudaGetLastError();
}

}  // namespace

extern "C" {

// Ints of workspace that a call needs.
int64_t unimega_routing_workspace(int64_t tokens, int experts) {
    return static_cast<int64_t>(experts) * (blocks_of(tokens) + 1);
}

// The k best experts of every token and the expert-major order of all slots. Three launches. Returns a cudaError_t.
//   logits   [tokens, experts] fp32          bias     [experts] fp32 or null: added for the choice alone
//   rows     tokens from here on get no expert (id = experts, weight 0)
//   weights  [tokens, k] fp32                chosen   [tokens, k]
//   offsets  [experts + 1]: slots of expert e lie in offsets[e] .. offsets[e + 1], slots without one after them
//   places   [tokens, k]: where a slot lies  source   [tokens * k]: the slot (token * k + j) that lies there
int unimega_route(const float *logits, const float *bias, int64_t tokens, int64_t rows, int experts, int k, int sigmoid,
                  int normalize, float scale, int groups, int group_topk, float *weights, int *chosen, int *workspace,
                  int *offsets, int *places, int *source, void *stream) {
    const Choice c{experts, k, groups, group_topk, sigmoid != 0, normalize != 0, scale};
    auto *s = static_cast<cudaStream_t>(stream);
    const cudaError_t error = choice(logits, bias, tokens, rows, c, weights, chosen, workspace, s);
    return error != cudaSuccess ? error : order(chosen, tokens, experts, k, workspace, offsets, places, source, s);
}

// The k best experts alone: weights and chosen as above. One launch. Returns a cudaError_t.
int unimega_topk_routing(const float *logits, const float *bias, int64_t tokens, int64_t rows, int experts, int k,
                         int sigmoid, int normalize, float scale, int groups, int group_topk, float *weights,
                         int *chosen, void *stream) {
    const Choice c{experts, k, groups, group_topk, sigmoid != 0, normalize != 0, scale};
    return choice(logits, bias, tokens, rows, c, weights, chosen, nullptr, static_cast<cudaStream_t>(stream));
}

// The order of slots whose experts are known. Three launches. Returns a cudaError_t.
int unimega_expert_order(const int *chosen, int64_t tokens, int experts, int k, int *workspace, int *offsets, int *places,
                         int *source, void *stream) {
    if (unfit(tokens, experts, k)) return cudaErrorInvalidValue;
    auto *s = static_cast<cudaStream_t>(stream);
    count<<<blocks_of(tokens), 256, 0, s>>>(chosen, tokens, experts, k, workspace, blocks_of(tokens));
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
    return order(chosen, tokens, experts, k, workspace, offsets, places, source, s);
}

const char *unimega_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
}
