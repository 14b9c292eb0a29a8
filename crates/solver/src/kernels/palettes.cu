// Exact palettes: the weighted values of each group of rows, cut into clusters with the least sum of
// squares, and the index of the nearest entry of each weight.
//
// Weights of values are integers, so that their sums do not depend on the order of the threads.

#define KEYS 65536
#define ALL 0xffffffffu

typedef unsigned short u16;
typedef unsigned char u8;
typedef unsigned long long u64;
typedef long long i64;

// The rank of an fp16 value among all of them in ascending order; -0 has the rank of 0.
__device__ unsigned key_of(u16 bits) {
    if (bits == 0x8000) return 0x8000;
    return (bits & 0x8000) ? (u16)~bits : (u16)(bits | 0x8000);
}

__device__ float value_of(unsigned key) {
    u16 bits = (key & 0x8000) ? (u16)(key & 0x7fff) : (u16)~key;
    return float_of(bits);
}

// Adds up the weights of each value. weights [groups, length] fp16; keep, of the same shape: 0 where
// pruned, or null; importance [columns], or null for 1; histograms [groups, KEYS], zeros at first.
extern "C" __global__ void count_values(const u16* weights, const u8* keep, const u64* importance, u64* histograms,
                                        i64 length, int columns) {
    i64 start = (i64)blockIdx.y * length;
    u64* histogram = histograms + (i64)blockIdx.y * KEYS;
    for (i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x; at < length; at += (i64)gridDim.x * blockDim.x) {
        if (keep != nullptr && keep[start + at] == 0) continue;
        u64 weight = importance == nullptr ? 1 : importance[at % columns];
        if (weight > 0) atomicAdd(&histogram[key_of(weights[start + at])], weight);
    }
}

// The sum of the numbers of all threads before this one, and that of all threads.
template <typename T>
__device__ T sum_before(T own, T* shared, T* total) {
    int thread = threadIdx.x;
    shared[thread] = own;
    __syncthreads();
    for (int distance = 1; distance < (int)blockDim.x; distance *= 2) {
        T more = thread >= distance ? shared[thread - distance] : (T)0;
        __syncthreads();
        shared[thread] += more;
        __syncthreads();
    }
    T before = thread > 0 ? shared[thread - 1] : (T)0;
    *total = shared[blockDim.x - 1];
    __syncthreads();
    return before;
}

// The distinct values of each group, ascending, with the sums of weights and of weighted values up to
// each: values [groups, room], sums [groups, 2, room + 1], counts [groups]. The number of threads
// divides KEYS.
extern "C" __global__ void collect_values(const u64* histograms, float* values, double* sums, int* counts, int room) {
    __shared__ int shared_counts[1024];
    __shared__ u64 shared_weights[1024];
    __shared__ double shared_sums[1024];
    const u64* histogram = histograms + (i64)blockIdx.x * KEYS;
    values += (i64)blockIdx.x * room;
    double* weights = sums + (i64)blockIdx.x * 2 * (room + 1);
    double* weighted = weights + room + 1;
    int keys = KEYS / blockDim.x;
    int first = threadIdx.x * keys;
    int count = 0;
    u64 weight = 0;
    double sum = 0.0;
    for (int key = first; key < first + keys; ++key) {
        u64 of_key = histogram[key];
        if (of_key > 0) {
            ++count;
            weight += of_key;
            sum += (double)of_key * (double)value_of(key);
        }
    }
    int all;
    u64 all_weights;
    double all_sums;
    int place = sum_before(count, shared_counts, &all);
    weight = sum_before(weight, shared_weights, &all_weights);
    sum = sum_before(sum, shared_sums, &all_sums);
    if (threadIdx.x == 0) {
        counts[blockIdx.x] = all;
        weights[0] = 0.0;
        weighted[0] = 0.0;
    }
    for (int key = first; key < first + keys; ++key) {
        u64 of_key = histogram[key];
        if (of_key > 0) {
            values[place] = value_of(key);
            weight += of_key;
            sum += (double)of_key * (double)value_of(key);
            ++place;
            weights[place] = (double)weight;
            weighted[place] = sum;
        }
    }
}

// (sum w v)^2 / (sum w) over [begin, end): what a cluster saves of the sum of w v^2.
__device__ double saved(const double* weights, const double* weighted, int begin, int end) {
    double weight = weights[end] - weights[begin];
    double value = weighted[end] - weighted[begin];
    return weight > 0.0 ? value * value / weight : 0.0;
}

// The begin of the last of `clusters` clusters up to `end`, between two bounds, that saves most.
struct Best {
    double saved;
    int begin;
};

__device__ bool is_better(double saved, int begin, const Best& best) {
    return saved > best.saved || (saved == best.saved && begin < best.begin);
}

// Cuts each group's values into `entries` clusters by dynamic programming over the number of
// clusters. Best begins rise with the ends, so that ends are done in rounds, each between ends that
// are done. costs [groups, 2, room + 1], begins [groups, entries, room + 1] are working memory.
// palettes [groups, entries] fp16, ascending; entries too many repeat the last one.
extern "C" __global__ void cut_values(const float* values, const double* sums, const int* counts, double* costs,
                                      u16* begins, u16* palettes, int room, int entries) {
    __shared__ int ends[257];
    int group = blockIdx.x;
    int n = counts[group];
    values += (i64)group * room;
    const double* weights = sums + (i64)group * 2 * (room + 1);
    const double* weighted = weights + room + 1;
    double* before = costs + (i64)group * 2 * (room + 1);
    double* after = before + room + 1;
    begins += (i64)group * entries * (room + 1);
    palettes += (i64)group * entries;
    int thread = threadIdx.x;
    if (n <= entries) {
        for (int entry = thread; entry < entries; entry += blockDim.x) {
            palettes[entry] = n == 0 ? (u16)0 : half_of((double)values[min(entry, n - 1)]);
        }
        return;
    }
    for (int end = thread + 1; end <= n; end += blockDim.x) before[end] = saved(weights, weighted, 0, end);
    __syncthreads();
    for (int clusters = 2; clusters <= entries; ++clusters) {
        u16* begin_of = begins + (i64)(clusters - 1) * (room + 1);
        // Each of the clusters to come needs a value.
        int last = n - (entries - clusters);
        int first = clusters == entries ? last : clusters;
        int span = last - first + 1;
        int stride = 1;
        while (stride <= span) stride *= 2;
        for (stride /= 2; stride >= 1; stride /= 2) {
            bool by_warps = stride >= 64;
            int lanes = by_warps ? 32 : 1;
            int lane = thread % lanes;
            for (int number = thread / lanes;; number += blockDim.x / lanes) {
                int place = stride - 1 + 2 * stride * number;
                if (place >= span) break;
                int end = first + place;
                int low = place >= stride ? begin_of[end - stride] : clusters - 1;
                int high = place + stride < span ? begin_of[end + stride] : end - 1;
                low = max(low, clusters - 1);
                high = min(high, end - 1);
                Best best = {-1.0, end};
                for (int begin = low + lane; begin <= high; begin += lanes) {
                    double total = before[begin] + saved(weights, weighted, begin, end);
                    if (is_better(total, begin, best)) best = {total, begin};
                }
                if (by_warps) {
                    for (int distance = 16; distance > 0; distance /= 2) {
                        double theirs = __shfl_xor_sync(ALL, best.saved, distance);
                        int begin = __shfl_xor_sync(ALL, best.begin, distance);
                        if (is_better(theirs, begin, best)) best = {theirs, begin};
                    }
                }
                if (lane == 0) {
                    after[end] = best.saved;
                    begin_of[end] = (u16)best.begin;
                }
            }
            __syncthreads();
        }
        double* done = after;
        after = before;
        before = done;
    }
    if (thread == 0) {
        int end = n;
        ends[entries] = n;
        for (int clusters = entries; clusters >= 2; --clusters) {
            end = begins[(i64)(clusters - 1) * (room + 1) + end];
            ends[clusters - 1] = end;
        }
        ends[0] = 0;
    }
    __syncthreads();
    for (int entry = thread; entry < entries; entry += blockDim.x) {
        int begin = ends[entry], end = ends[entry + 1];
        double mean = (weighted[end] - weighted[begin]) / (weights[end] - weights[begin]);
        // Rounding must not move the mean out of its cluster.
        mean = fmin(fmax(mean, (double)values[begin]), (double)values[end - 1]);
        palettes[entry] = half_of(mean);
    }
}

// The index of the nearest entry of each kept weight, the lower of two equally near ones; 0 where
// pruned. weights and indices [groups, length]; palettes [groups, entries] fp16.
extern "C" __global__ void look_up(const u16* weights, const u8* keep, const u16* palettes, u8* indices, i64 length,
                                   int entries) {
    i64 start = (i64)blockIdx.y * length;
    const u16* palette = palettes + (i64)blockIdx.y * entries;
    for (i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x; at < length; at += (i64)gridDim.x * blockDim.x) {
        int low = 0;
        if (keep == nullptr || keep[start + at] != 0) {
            // A sum of two fp16 numbers is exact in fp64.
            double twice = 2.0 * (double)float_of(weights[start + at]);
            int high = entries - 1;
            while (low < high) {
                int middle = (low + high) / 2;
                double sum = (double)float_of(palette[middle]) + (double)float_of(palette[middle + 1]);
                if (sum < twice) low = middle + 1;
                else high = middle;
            }
        }
        indices[start + at] = (u8)low;
    }
}
