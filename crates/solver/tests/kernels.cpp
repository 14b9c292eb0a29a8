// Runs the CUDA kernels on the CPU, a thread for each of theirs, and compares what they compute with
// plain loops. `kernels.rs` compiles and starts it. It ends with 1 if anything differs.

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

using std::max;
using std::min;

// What the kernels use of CUDA.
struct Index {
    int x, y;
};
static thread_local Index threadIdx, blockIdx;
static Index blockDim, gridDim;
static std::barrier<>* block_barrier;
static std::vector<std::unique_ptr<std::barrier<>>> warp_barriers;
static unsigned long long exchanged[32][32];
static unsigned voted[32][32];

#define __global__
#define __device__
#define __shared__ static
#define __align__(bytes) alignas(bytes)

static void __syncthreads() { block_barrier->arrive_and_wait(); }
static void wait_for_warp() { warp_barriers[threadIdx.x / 32]->arrive_and_wait(); }

template <class T>
static T from_lane(T value, int lane) {
    unsigned long long bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    exchanged[threadIdx.x / 32][threadIdx.x % 32] = bits;
    wait_for_warp();
    T result;
    std::memcpy(&result, &exchanged[threadIdx.x / 32][lane], sizeof result);
    wait_for_warp();
    return result;
}
template <class T>
static T __shfl_xor_sync(unsigned, T value, int distance) {
    return from_lane(value, (threadIdx.x % 32) ^ distance);
}
template <class T>
static T __shfl_sync(unsigned, T value, int lane) {
    return from_lane(value, lane);
}
static unsigned __ballot_sync(unsigned, bool vote) {
    voted[threadIdx.x / 32][threadIdx.x % 32] = vote;
    wait_for_warp();
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= voted[threadIdx.x / 32][lane] << lane;
    wait_for_warp();
    return votes;
}
static int __popc(unsigned bits) { return __builtin_popcount(bits); }
static float __int_as_float(int bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
static void atomicAdd(unsigned long long* sum, unsigned long long more) { __atomic_fetch_add(sum, more, __ATOMIC_RELAXED); }

// fp16 by its bits, without the GPU's instructions of `half.cu`: round to nearest, ties to even.
static float float_of(unsigned short bits) {
    int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    double value = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(mantissa + 1024, exponent - 25);
    if (exponent == 31) value = mantissa ? NAN : INFINITY;
    return (float)(bits & 0x8000 ? -value : value);
}
static unsigned short half_of(double value) {
    double size = std::fabs(value);
    unsigned short sign = value < 0 ? 0x8000 : 0;
    if (size >= 65520) return sign | 0x7c00;
    int exponent = size < 0x1p-14 ? -14 : (int)std::floor(std::log2(size));
    if (exponent > -14 && std::ldexp(1.0, exponent) > size) --exponent;
    if (std::ldexp(2.0, exponent) <= size) ++exponent;
    int digits = (int)std::nearbyint(std::ldexp(size, 10 - exponent));
    int bits = digits + (exponent == -14 && digits < 1024 ? 0 : ((exponent + 14) << 10));
    return bits == 0 ? 0 : sign | bits;
}

#include "../src/kernels/rows.cu"
#include "../src/kernels/descent.cu"
#include "../src/kernels/palettes.cu"

static void launch(int across, int down, int threads, const std::function<void()>& kernel) {
    blockDim = {threads, 1};
    gridDim = {across, down};
    for (int y = 0; y < down; ++y) {
        for (int x = 0; x < across; ++x) {
            std::barrier<> barrier(threads);
            block_barrier = &barrier;
            warp_barriers.clear();
            for (int warp = 0; warp < threads / 32; ++warp) warp_barriers.emplace_back(new std::barrier<>(32));
            std::vector<std::thread> all;
            for (int thread = 0; thread < threads; ++thread) {
                all.emplace_back([=, &kernel] {
                    threadIdx = {thread, 0};
                    blockIdx = {x, y};
                    kernel();
                });
            }
            for (auto& one : all) one.join();
        }
    }
}

static int failures = 0;
static void check(bool holds, const char* what, int number) {
    if (!holds) {
        std::printf("%s differs in case %d\n", what, number);
        ++failures;
    }
}

static std::mt19937 random_bits(1);
static float normal() { return std::normal_distribution<float>(0, 1)(random_bits); }

struct PaletteCase {
    int groups, length, columns, entries;
    bool weighted, pruned;
    int distinct;  // The number of different weights; 0 is any, -1 prunes all.
};

// The least weighted sum of squares of a cut into clusters, by the textbook dynamic program.
static double least(const std::vector<std::pair<double, double>>& points, int clusters) {
    int n = points.size();
    if (n <= clusters) return 0;
    std::vector<double> weights(n + 1), sums(n + 1), squares(n + 1);
    for (int i = 0; i < n; ++i) {
        auto [value, weight] = points[i];
        weights[i + 1] = weights[i] + weight;
        sums[i + 1] = sums[i] + weight * value;
        squares[i + 1] = squares[i] + weight * value * value;
    }
    std::vector<double> cost(n + 1, 1e300);
    cost[0] = 0;
    for (int k = 0; k < clusters; ++k) {
        std::vector<double> next(n + 1, 1e300);
        for (int end = 1; end <= n; ++end) {
            for (int begin = 0; begin < end; ++begin) {
                double weight = weights[end] - weights[begin], sum = sums[end] - sums[begin];
                next[end] = min(next[end], cost[begin] + squares[end] - squares[begin] - sum * sum / weight);
            }
        }
        cost = next;
    }
    return cost[n];
}

static void palettes(const PaletteCase& now, int number) {
    int count = now.groups * now.length, room = now.length;
    std::vector<u16> weights(count);
    for (auto& weight : weights) {
        weight = half_of(now.distinct > 0 ? 0.5 * ((int)(random_bits() % now.distinct) - 2) : 0.03 * normal());
    }
    std::vector<u8> keep(count, 1);
    if (now.pruned) {
        for (auto& kept : keep) kept = now.distinct < 0 ? 0 : random_bits() % 5 > 1;
    }
    std::vector<u64> importance(now.columns);
    for (auto& weight : importance) weight = random_bits() % 7 == 0 ? 0 : 1 + random_bits() % 100000;
    const u8* kept = now.pruned ? keep.data() : nullptr;
    const u64* weighted = now.weighted ? importance.data() : nullptr;

    std::vector<u64> histograms((size_t)now.groups * KEYS, 0);
    launch(2, now.groups, 32, [&] { count_values(weights.data(), kept, weighted, histograms.data(), now.length, now.columns); });
    std::vector<float> values(now.groups * room);
    std::vector<Sums> sums(now.groups * (room + 1));
    std::vector<int> counts(now.groups);
    launch(now.groups, 1, 64, [&] { collect_values(histograms.data(), values.data(), sums.data(), counts.data(), room); });
    std::vector<double> costs(now.groups * 2 * (room + 1), -1e300);
    std::vector<u16> begins((size_t)now.groups * now.entries * (room + 1), 60000);
    std::vector<u16> made(now.groups * now.entries, 1);
    launch(now.groups, 1, 128, [&] {
        cut_values(values.data(), sums.data(), counts.data(), costs.data(), begins.data(), made.data(), room, now.entries);
    });
    std::vector<u8> indices(count, 255);
    launch(2, now.groups, 32, [&] { look_up(weights.data(), kept, made.data(), indices.data(), now.length, now.entries); });

    for (int group = 0; group < now.groups; ++group) {
        const u16* palette = made.data() + group * now.entries;
        std::vector<std::pair<double, double>> points;
        double error = 0, total = 0;
        bool near = true, ascending = true;
        for (int at = group * now.length; at < (group + 1) * now.length; ++at) {
            if (!keep[at]) {
                near = near && indices[at] == 0;
                continue;
            }
            double value = float_of(weights[at]) + 0.0;
            double weight = weighted ? (double)importance[at % now.length % now.columns] : 1;
            double distance = std::fabs(value - float_of(palette[indices[at]]));
            for (int entry = 0; entry < now.entries; ++entry) {
                double other = std::fabs(value - float_of(palette[entry]));
                near = near && distance <= other && (distance < other || indices[at] <= entry || palette[entry] == palette[indices[at]]);
            }
            error += weight * distance * distance;
            total += weight * value * value;
            if (weight > 0) points.push_back({value, weight});
        }
        std::sort(points.begin(), points.end());
        std::vector<std::pair<double, double>> distinct;
        for (auto& point : points) {
            if (!distinct.empty() && distinct.back().first == point.first) distinct.back().second += point.second;
            else distinct.push_back(point);
        }
        for (int entry = 1; entry < now.entries; ++entry) ascending = ascending && float_of(palette[entry]) >= float_of(palette[entry - 1]);
        check((int)distinct.size() == counts[group], "the number of values", number);
        check(near, "an index", number);
        check(ascending, "the order of a palette", number);
        // The tolerance is for palettes in fp16.
        check(error <= least(distinct, now.entries) * 1.001 + 3e-7 * total, "the error of a palette", number);
    }
}

// The index of the nearest entry, the lower of two equally near ones.
static int nearest_of(const float* palette, int entries, float value) {
    int index = 0;
    for (int at = 0; at + 1 < entries; ++at) index += (palette[at] + palette[at + 1]) / 2.0f < value;
    return index;
}

static void rows(int count, int width, int entries, bool pruned, int n, int m, int number) {
    int stride = width + 3, group_rows = 2;
    std::vector<float> upper(width * width), corner(width * width), start(count * width), gradients(count * width);
    for (int row = 0; row < width; ++row) {
        for (int column = 0; column < width; ++column) {
            upper[row * width + column] = row == column ? 1 + 0.2f * std::fabs(normal()) : 0.1f * normal();
            corner[row * width + column] = row == column ? 2 + std::fabs(normal()) : 0;
        }
    }
    for (int row = 0; row < width; ++row) {
        for (int column = 0; column < row; ++column) corner[row * width + column] = corner[column * width + row] = 0.1f * normal();
    }
    if (width > 2) corner[2 * width + 2] = 0;  // A dead column.
    for (auto& value : start) value = normal();
    for (auto& value : gradients) value = normal();
    int groups = (count + group_rows - 1) / group_rows;
    std::vector<float> palette(groups * entries);
    for (auto& value : palette) value = float_of(half_of(normal()));
    for (int group = 0; group < groups; ++group) std::sort(palette.begin() + group * entries, palette.begin() + (group + 1) * entries);
    std::vector<u8> keep(count * stride, 1);
    if (pruned) {
        for (auto& kept : keep) kept = random_bits() % 3 > 0;
    }

    std::vector<float> values = start;
    std::vector<u8> indices(count * stride, 77), marks = keep;
    std::vector<double> squares(count, 0.5);
    bool by_palette = m == 0;
    launch((count + 3) / 4, 1, 128, [&] {
        sweep(values.data(), upper.data(), pruned || m ? marks.data() : nullptr, by_palette ? palette.data() : nullptr,
              indices.data(), squares.data(), count, width, stride, group_rows, entries, n, m);
    });
    for (int row = 0; row < count; ++row) {
        std::vector<float> expected(start.begin() + row * width, start.begin() + (row + 1) * width);
        const float* own = palette.data() + row / group_rows * entries;
        std::vector<int> kept(width);
        for (int column = 0; column < width; ++column) kept[column] = m ? 1 : keep[row * stride + column];
        double square = 0.5;
        for (int column = 0; column < width; ++column) {
            if (m && column % m == 0 && column + m <= width) {
                std::vector<std::pair<float, int>> scores;
                for (int at = column; at < column + m; ++at) {
                    float scaled = expected[at] / upper[at * width + at];
                    scores.push_back({scaled * scaled, at});
                }
                std::sort(scores.begin(), scores.end());
                for (int at = 0; at < n; ++at) kept[scores[at].second] = 0;
            }
            float target = kept[column] ? expected[column] : 0;
            if (by_palette && kept[column]) {
                int entry = nearest_of(own, entries, expected[column]);
                check(indices[row * stride + column] == entry, "an index of the sweep", number);
                target = own[entry];
            }
            float error = (expected[column] - target) / upper[column * width + column];
            square += (double)error * error;
            expected[column] = target;
            for (int at = column + 1; at < width; ++at) expected[at] -= error * upper[column * width + at];
            check(std::fabs(values[row * width + column] - target) < 1e-4, "a value of the sweep", number);
            if (m) check(marks[row * stride + column] == kept[column], "the mask of the sweep", number);
        }
        check(std::fabs(squares[row] - square) < 1e-3 * square, "the errors of the sweep", number);
    }
    if (m) return;

    std::vector<u8> polished(count * stride, 0);
    std::vector<float> change(count * stride, 0.25f);
    std::vector<int> changed(count, 10);
    launch((count + 3) / 4, 1, 128, [&] {
        polish(gradients.data(), corner.data(), pruned ? keep.data() : nullptr, palette.data(), polished.data(), change.data(),
               changed.data(), count, width, stride, group_rows, entries, 2);
    });
    for (int row = 0; row < count; ++row) {
        const float* own = palette.data() + row / group_rows * entries;
        std::vector<float> gradient(gradients.begin() + row * width, gradients.begin() + (row + 1) * width), moved(width, 0);
        std::vector<int> index(width, 0);
        int changes = 10;
        for (int pass = 0; pass < 2; ++pass) {
            for (int column = 0; column < width; ++column) {
                float h = corner[column * width + column];
                if ((pruned && !keep[row * stride + column]) || !(h > 0)) continue;
                float value = own[index[column]];
                int entry = nearest_of(own, entries, value - gradient[column] / h);
                float step = own[entry] - value, gain = -step * (2 * gradient[column] + step * h);
                if (step == 0 || !(gain > 1e-5f * step * step * h)) continue;
                index[column] = entry;
                moved[column] += step;
                ++changes;
                for (int at = 0; at < width; ++at) gradient[at] += step * corner[column * width + at];
            }
        }
        check(changed[row] == changes, "the number of changes of the polish", number);
        for (int column = 0; column < width; ++column) {
            check(polished[row * stride + column] == index[column], "an index of the polish", number);
            check(std::fabs(change[row * stride + column] - 0.25f - moved[column]) < 1e-4, "a change of the polish", number);
        }
    }
}

// Two steps of conjugate gradients. The last row is solved: its direction is zero.
static void descent(int count, int width, int number) {
    std::vector<float> weights(count * width), gradients(count * width), directions(count * width), mask(count * width), conditioner(width);
    for (auto& value : weights) value = normal();
    for (auto& value : gradients) value = normal();
    for (auto& value : mask) value = random_bits() % 3 > 0;
    for (auto& value : conditioner) value = random_bits() % 9 > 0 ? std::fabs(normal()) : 0;
    std::vector<double> before(count), lower(count, -1);
    for (int row = 0; row < count; ++row) {
        for (int column = 0; column < width; ++column) {
            int at = row * width + column;
            if (row + 1 == count) gradients[at] = 0;
            directions[at] = -gradients[at] * mask[at] * conditioner[column];
            before[row] -= (double)gradients[at] * directions[at];
        }
    }
    std::vector<double> w(weights.begin(), weights.end()), g(gradients.begin(), gradients.end()), p(directions.begin(), directions.end());
    std::vector<double> was = before;
    for (int step = 0; step < 2; ++step) {
        // Products with a diagonal H.
        std::vector<float> products(count * width);
        for (int at = 0; at < count * width; ++at) products[at] = directions[at] * (1 + at % width % 5);
        launch(count, 1, WORKERS, [&] {
            descend(weights.data(), gradients.data(), directions.data(), products.data(), mask.data(), conditioner.data(), before.data(),
                    lower.data(), count, width);
        });
        for (int row = 0; row < count; ++row) {
            double curvature = 0, now = 0;
            for (int at = row * width; at < (row + 1) * width; ++at) curvature += p[at] * p[at] * (1 + at % width % 5);
            double length = curvature > 0 ? was[row] / curvature : 0;
            for (int at = row * width; at < (row + 1) * width; ++at) {
                w[at] += length * p[at];
                g[at] += length * p[at] * (1 + at % width % 5);
                now += g[at] * g[at] * mask[at] * conditioner[at % width];
            }
            double kept = was[row] > 0 ? now / was[row] : 0;
            for (int at = row * width; at < (row + 1) * width; ++at) {
                p[at] = kept * p[at] - g[at] * mask[at] * conditioner[at % width];
                check(std::fabs(weights[at] - w[at]) < 1e-4, "a weight of the descent", number);
                check(std::fabs(gradients[at] - g[at]) < 1e-4, "a gradient of the descent", number);
                check(std::fabs(directions[at] - p[at]) < 1e-4, "a direction of the descent", number);
            }
            check(std::fabs(lower[row] - length * was[row]) <= 1e-4 * was[row], "the gain of the descent", number);
            check(std::fabs(before[row] - now) <= 1e-4 * (now + 1e-3), "the dot product of the descent", number);
            was[row] = now;
        }
    }
}

int main() {
    PaletteCase cases[] = {{2, 1500, 150, 16, true, true, 0}, {1, 500, 50, 4, false, false, 0}, {3, 64, 32, 16, false, true, 5},
                           {1, 900, 90, 8, true, false, 0},   {1, 40, 20, 64, false, false, 0}, {1, 700, 70, 2, true, true, 0},
                           {1, 30, 10, 8, false, true, -1},   {1, 300, 300, 256, true, false, 0}};
    int number = 0;
    for (auto& now : cases) palettes(now, number++);
    rows(5, 128, 16, true, 0, 0, number++);
    rows(4, 37, 4, false, 0, 0, number++);
    rows(2, 100, 64, true, 0, 0, number++);
    rows(2, 128, 256, false, 0, 0, number++);
    rows(3, 126, 2, false, 2, 4, number++);
    rows(2, 64, 2, false, 5, 8, number++);
    descent(3, 300, number++);
    descent(2, 37, number++);
    std::printf("%d cases, %d failures\n", number, failures);
    return failures > 0;
}
