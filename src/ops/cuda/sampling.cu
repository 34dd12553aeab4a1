// The token that follows, chosen as `sampling.rs` does: `prepare_scores`, then `choose_token`.
//
// Weights are `e^(score - highest)` in fixed point: their sums are integers, exact in any order.

// Neighbouring tokens, of which one warp finds the highest score.
constexpr int GROUP = 256;

constexpr unsigned NO_TOKEN = 0xffffffffu;
constexpr unsigned NOT_A_NUMBER = 0xffffffffu;

struct Highest {
    __device__ __forceinline__ unsigned operator()(unsigned a, unsigned b) const { return a < b ? b : a; }
};

// An integer that is as high among others as the score is: -0 is 0, and NaN is above all.
__device__ __forceinline__ unsigned key_of(float score) {
    if (score != score) return NOT_A_NUMBER;
    const unsigned bits = __float_as_uint(score == 0 ? 0.0f : score);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float score_of(unsigned key) {
    return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// Infinity less itself is NaN.
__device__ __forceinline__ bool is_finite(float score) { return __fsub_rn(score, score) == 0; }

// What is impossible stays so at any temperature, also at one that is infinite.
__device__ __forceinline__ float at_temperature(float score, float temperature) {
    const float impossible = __uint_as_float(0xff800000u);
    return score == impossible ? score : __fdiv_rn(score, temperature);
}

// keys[token] = the key of the token's score after penalty and temperature; `keys` may be null. Of each group of tokens,
// before the temperature: the highest key, and the first token that has it.
// `stands` has a bit for each token: whether it stands in the text. It may be null.
// Grid: blocks of 256 threads, a warp for each group.
extern "C" __global__ void __launch_bounds__(256) prepare_scores(
    const real* __restrict__ logits, const unsigned* __restrict__ stands, unsigned* __restrict__ keys,
    unsigned* __restrict__ group_highest, unsigned* __restrict__ group_first, int vocabulary, float penalty,
    float temperature
) {
    const int group = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    const int lane = threadIdx.x % WARP;
    const int start = group * GROUP;
    const int end = min(vocabulary, start + GROUP);
    unsigned highest = 0, first = NO_TOKEN;
#pragma unroll 4
    for (int token = start + lane; token < end; token += WARP) {
        float score = widen(logits[token]);
        if (stands && stands[token / 32] >> token % 32 & 1) {
            score = score < 0 ? __fmul_rn(score, penalty) : __fdiv_rn(score, penalty);
        }
        const unsigned key = key_of(score);
        if (key > highest) {
            highest = key;
            first = token;
        }
        if (keys) keys[token] = key_of(at_temperature(score, temperature));
    }
    const unsigned of_group = reduce_warp(highest, Highest());
    first = reduce_warp(highest == of_group ? first : NO_TOKEN, Smallest());
    if (lane == 0 && start < vocabulary) {
        group_highest[group] = of_group;
        group_first[group] = first;
    }
}

// --- sums over places, in their order ---

// What the warps before the caller's have, and what all have.
struct Sums {
    unsigned long long before, all;
};

__device__ __forceinline__ Sums sum_warps(unsigned long long of_warp) {
    __shared__ unsigned long long warps[WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    // The last sums have been read by all before these are written.
    __syncthreads();
    if (lane == 0) warps[warp] = of_warp;
    __syncthreads();
    const unsigned long long of_lane = lane < blockDim.x / WARP ? warps[lane] : 0;
    Sums sums;
    sums.before = sum_warp(lane < warp ? of_lane : 0);
    sums.all = sum_warp(of_lane);
    return sums;
}

// The neighbouring places that the caller's warp looks after: whole groups.
struct Range {
    int first, end;

    __device__ __forceinline__ explicit Range(int count) {
        const int warps = blockDim.x / WARP;
        const int groups = (count + GROUP - 1) / GROUP;
        const int each = (groups + warps - 1) / warps * GROUP;
        first = min(count, static_cast<int>(threadIdx.x / WARP) * each);
        end = min(count, first + each);
    }
};

// Σ measure(place) over `count` places.
template <typename Measure> __device__ __forceinline__ unsigned long long measure_all(int count, Measure measure) {
    unsigned long long sum = 0;
    for (int place = threadIdx.x; place < count; place += blockDim.x) sum += measure(place);
    return sum_block(sum);
}

// The first place up to which the places measure more than `limit`; all of them do.
template <typename Measure>
__device__ __forceinline__ int first_beyond(int count, unsigned long long limit, Measure measure) {
    __shared__ int found;
    const int lane = threadIdx.x % WARP;
    const Range range(count);
    unsigned long long own = 0;
    for (int place = range.first + lane; place < range.end; place += WARP) own += measure(place);
    own = sum_warp(own);
    unsigned long long passed = sum_warps(own).before;
    // It lies in the range of one warp.
    if (passed <= limit && limit < passed + own) {
        for (int start = range.first; start < range.end; start += WARP) {
            unsigned long long sum = start + lane < range.end ? measure(start + lane) : 0;
#pragma unroll
            for (int distance = 1; distance < WARP; distance *= 2) {
                const unsigned long long left = __shfl_up_sync(ALL_LANES, sum, distance);
                if (lane >= distance) sum += left;
            }
            sum += passed;
            const unsigned beyond = __ballot_sync(ALL_LANES, sum > limit);
            if (beyond) {
                if (lane == 0) found = start + __ffs(beyond) - 1;
                break;
            }
            passed = __shfl_sync(ALL_LANES, sum, WARP - 1);
        }
    }
    __syncthreads();
    return found;
}

// The highest key from `low` to `high` below which the places measure at most `limit`: below `low` they do.
template <typename Measure>
__device__ __forceinline__ unsigned highest_key(
    const unsigned* keys, int count, unsigned low, unsigned high, unsigned long long limit, Measure measure
) {
    while (low < high) {
        const unsigned middle = high - (high - low) / 2;
        const unsigned long long below =
            measure_all(count, [&](int place) { return keys[place] < middle ? measure(place) : 0ull; });
        if (below <= limit) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

struct One {
    __device__ __forceinline__ unsigned long long operator()(int) const { return 1; }
};

// The key of the `rank`th highest, counted from 1 and at most `count`; it is from `low` to `high`.
__device__ __forceinline__ unsigned ranked_key(const unsigned* keys, int count, int rank, unsigned low, unsigned high) {
    return highest_key(keys, count, low, high, count - rank, One());
}

// --- the draw ---

// The tokens that may be drawn, in ascending order, and what else excludes some of them.
struct Candidates {
    const unsigned* keys;
    // Null where each token is at its own place.
    const unsigned* tokens;
    int count;
    float highest;
    // The weight of the highest.
    float unit;
    // No key is below `lowest`, and those equal to it stand at places up to `last`.
    unsigned lowest;
    int last;
    // No weight is below it, in parts of the highest's.
    double least;

    __device__ __forceinline__ unsigned long long weight_of(unsigned key) const {
        const float weight = expf(__fsub_rn(score_of(key), highest));
        return double(weight) >= least ? __float2ll_rn(__fmul_rn(weight, unit)) : 0;
    }

    __device__ __forceinline__ unsigned long long operator()(int place) const {
        const unsigned key = keys[place];
        return key < lowest || (key == lowest && place > last) ? 0 : weight_of(key);
    }
};

// Memory of the length of the vocabulary, for candidates that are fewer.
struct Room {
    unsigned *keys, *tokens;
};

// Goes on with those whose keys `stays` accepts, which accepts every key above one that it accepts. A group is passed
// over where it does not accept the highest.
template <typename Stays>
__device__ __forceinline__ void keep(
    Candidates& candidates, Room room, const unsigned* group_highest, float temperature, Stays stays
) {
    const int lane = threadIdx.x % WARP;
    const Range range(candidates.count);
    // The lanes whose candidates stay, from the one at `start` on.
    const auto staying = [&](int start) {
        return __ballot_sync(ALL_LANES, start + lane < range.end && stays(candidates.keys[start + lane]));
    };
    const auto passed_over = [&](int group) {
        return !stays(key_of(at_temperature(score_of(group_highest[group]), temperature)));
    };
    int own = 0;
    for (int first = range.first; first < range.end; first += GROUP) {
        if (passed_over(first / GROUP)) continue;
        for (int start = first; start < min(first + GROUP, range.end); start += WARP) own += __popc(staying(start));
    }
    const Sums sums = sum_warps(own);
    int next = sums.before;
    for (int first = range.first; first < range.end; first += GROUP) {
        if (passed_over(first / GROUP)) continue;
        for (int start = first; start < min(first + GROUP, range.end); start += WARP) {
            const unsigned lanes = staying(start);
            if (lanes >> lane & 1) {
                const int place = next + __popc(lanes & ((1u << lane) - 1));
                room.keys[place] = candidates.keys[start + lane];
                room.tokens[place] = start + lane;
            }
            next += __popc(lanes);
        }
    }
    __syncthreads();
    candidates.keys = room.keys;
    candidates.tokens = room.tokens;
    candidates.count = sums.all;
}

// Leaves the `top_k` highest, and those equal to the last of them.
__device__ __forceinline__ void keep_top_k(
    Candidates& candidates, Room room, const unsigned* group_highest, float temperature, int top_k
) {
    const int groups = (candidates.count + GROUP - 1) / GROUP;
    const unsigned highest = key_of(candidates.highest);
    unsigned low = 0;
    if (top_k <= groups) {
        // So many groups have one that is at least as high: most tokens can go at once.
        const unsigned bound = ranked_key(group_highest, groups, top_k, 0, NOT_A_NUMBER);
        low = key_of(at_temperature(score_of(bound), temperature));
        keep(candidates, room, group_highest, temperature, [&](unsigned key) { return key >= low; });
    }
    candidates.lowest = ranked_key(candidates.keys, candidates.count, top_k, low, highest);
}

// Drops the least likely as long as what is dropped sums to `share` of all or less; one always remains.
__device__ __forceinline__ void keep_top_p(
    Candidates& candidates, Room room, const unsigned* group_highest, float temperature, double share
) {
    const unsigned highest = key_of(candidates.highest);
    const unsigned long long total = measure_all(candidates.count, candidates);
    unsigned long long droppable = share * double(total);
    if (!candidates.tokens) {
        // All that are lighter than an equal part of the droppable can go at once.
        const unsigned long long light = droppable / candidates.count;
        const Candidates all = candidates;
        keep(candidates, room, group_highest, temperature, [&](unsigned key) {
            return key == highest || (key >= all.lowest && all.weight_of(key) > light);
        });
        droppable -= total - measure_all(candidates.count, candidates);
    }
    const unsigned lowest =
        highest_key(candidates.keys, candidates.count, candidates.lowest, highest, droppable, candidates);
    const unsigned* keys = candidates.keys;
    const unsigned long long below = measure_all(
        candidates.count, [&](int place) { return keys[place] < lowest ? candidates(place) : 0ull; }
    );
    const auto equal = [&](int place) -> unsigned long long { return keys[place] == lowest; };
    const unsigned long long equals = measure_all(candidates.count, equal);
    const unsigned long long dropped = (droppable - below) / candidates.weight_of(lowest);
    // Of equals the smallest tokens stay.
    candidates.last = first_beyond(candidates.count, dropped < equals ? equals - dropped - 1 : 0, equal);
    candidates.lowest = lowest;
}

// What became of a token.
constexpr unsigned CHOSEN = 0;
constexpr unsigned NOT_FINITE = 1;

// chosen = the token and what became of it. Without `keys` it is the first with the highest score; otherwise the 53
// highest bits of `random` draw it. The token's bit in `stands` is set, if that is not null.
// `unit` is the weight of the highest score, a power of two: its `vocabulary`-fold is below 2^63. `room_keys` and
// `room_tokens` have the length of `vocabulary`. `top_k` is from 1 to `vocabulary`, `share` from 0 to 1, and `min_p` too.
// Grid: one block of 32 to 1024 threads. No dynamic shared memory.
extern "C" __global__ void __launch_bounds__(1024, 1) choose_token(
    const unsigned* keys, const unsigned* group_highest, const unsigned* group_first, unsigned* room_keys,
    unsigned* room_tokens, unsigned* stands, unsigned* chosen, int vocabulary, float temperature, int top_k,
    double share, double min_p, float unit, unsigned long long random
) {
    const int groups = (vocabulary + GROUP - 1) / GROUP;
    unsigned highest = 0, token = NO_TOKEN;
    for (int group = threadIdx.x; group < groups; group += blockDim.x) highest = Highest()(highest, group_highest[group]);
    highest = reduce_block(highest, 0u, Highest());
    for (int group = threadIdx.x; group < groups; group += blockDim.x) {
        if (group_highest[group] == highest) token = Smallest()(token, group_first[group]);
    }
    token = reduce_block(token, NO_TOKEN, Smallest());
    const bool sound = is_finite(score_of(highest));
    const float score = at_temperature(score_of(highest), temperature);
    // It may be so cold that the scores overflow.
    if (keys && sound && is_finite(score)) {
        Candidates candidates = {keys, nullptr, vocabulary, score, unit, 0, vocabulary, 0};
        const Room room = {room_keys, room_tokens};
        if (top_k < vocabulary) keep_top_k(candidates, room, group_highest, temperature, top_k);
        if (share > 0) keep_top_p(candidates, room, group_highest, temperature, share);
        candidates.least = min_p;
        const unsigned long long total = measure_all(candidates.count, candidates);
        const unsigned long long at = __umul64hi(random >> 11 << 11, total);
        const int place = first_beyond(candidates.count, at, candidates);
        token = candidates.tokens ? candidates.tokens[place] : place;
    }
    if (threadIdx.x > 0) return;
    chosen[0] = token;
    chosen[1] = sound ? CHOSEN : NOT_FINITE;
    if (stands && sound) stands[token / 32] |= 1u << token % 32;
}
