// The steps of the solver that go column by column, for many rows at once. A warp works on one row:
// lane l has columns l, l + 32, l + 64 and l + 96 of a block of at most 128 columns.

#define LANES 32
#define SLOTS 4
#define ALL 0xffffffffu

// A row's palette: middles of neighbouring entries are spread over the lanes, as columns are.
struct Palette {
    const float* entries;
    int count;
    float middles[8];
};

__device__ Palette palette_of(const float* palettes, int group, int count, int lane) {
    Palette palette;
    palette.entries = palettes + (long long)group * count;
    palette.count = count;
    for (int slot = 0; slot < 8; ++slot) {
        int at = slot * LANES + lane;
        bool inside = at + 1 < count;
        // No number is above infinity: lanes without a middle never count.
        palette.middles[slot] = inside ? (palette.entries[at] + palette.entries[at + 1]) / 2.0f : __int_as_float(0x7f800000);
    }
    return palette;
}

// The index of the entry nearest to a value that all lanes have; the lower of two equally near ones.
__device__ int nearest(const Palette& palette, float value) {
    int index = 0;
    for (int slot = 0; slot * LANES + 1 < palette.count; ++slot) {
        index += __popc(__ballot_sync(ALL, palette.middles[slot] < value));
    }
    return index;
}


// Rounds a block column by column, with error feedback to the block's later columns.
//
// values [rows, width], in place: the weights, then what is stored. upper [width, width]: U.
// keep [rows, stride]: 0 where pruned, for the block's first column on; null where all are kept.
// palettes [groups, entries], ascending, and indices [rows, stride]; null where kept weights stay.
// squares [rows]: the sum of the squared errors, added; or null.
// n of m > 0: the n elements of least (w / U_jj)^2 of m neighbours are pruned, and marked in keep.
extern "C" __global__ void sweep(float* values, const float* upper, unsigned char* keep, const float* palettes,
                                 unsigned char* indices, double* squares, int rows, int width, int stride,
                                 int group_rows, int entries, int n, int m) {
    int row = blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES;
    int lane = threadIdx.x % LANES;
    if (row >= rows) return;
    float value[SLOTS];
    int kept[SLOTS];
    int index[SLOTS];
    for (int slot = 0; slot < SLOTS; ++slot) {
        int column = slot * LANES + lane;
        bool inside = column < width;
        value[slot] = inside ? values[(long long)row * width + column] : 0.0f;
        kept[slot] = inside && (keep == nullptr || keep[(long long)row * stride + column] != 0);
        index[slot] = 0;
    }
    Palette palette;
    if (palettes != nullptr) palette = palette_of(palettes, row / group_rows, entries, lane);
    double square = 0.0;
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot) {
        for (int owner = 0; owner < LANES; ++owner) {
            int column = slot * LANES + owner;
            if (column >= width) break;
            if (m > 0 && column % m == 0 && column + m <= width) {
                // m divides the lanes, so that a group is in one slot.
                int own = slot * LANES + lane;
                bool member = lane >= owner && lane < owner + m;
                float scaled = member ? value[slot] / upper[own * width + own] : 0.0f;
                float score = scaled * scaled;
                int rank = 0;
                for (int other = owner; other < owner + m; ++other) {
                    float theirs = __shfl_sync(ALL, score, other);
                    rank += theirs < score || (theirs == score && other < lane);
                }
                if (member) kept[slot] = rank >= n;
            }
            float now = __shfl_sync(ALL, value[slot], owner);
            bool is_kept = __shfl_sync(ALL, kept[slot], owner) != 0;
            float target = is_kept ? now : 0.0f;
            if (palettes != nullptr && is_kept) {
                int entry = nearest(palette, now);
                target = palette.entries[entry];
                if (lane == owner) index[slot] = entry;
            }
            float error = (now - target) / upper[column * width + column];
            square += (double)error * (double)error;
            if (lane == owner) value[slot] = target;
            if (error != 0.0f) {
#pragma unroll
                for (int later = slot; later < SLOTS; ++later) {
                    int at = later * LANES + lane;
                    if (at > column && at < width) value[later] -= error * upper[column * width + at];
                }
            }
        }
    }
    for (int slot = 0; slot < SLOTS; ++slot) {
        int column = slot * LANES + lane;
        if (column >= width) continue;
        values[(long long)row * width + column] = value[slot];
        if (palettes != nullptr) indices[(long long)row * stride + column] = (unsigned char)index[slot];
        if (m > 0) keep[(long long)row * stride + column] = (unsigned char)kept[slot];
    }
    if (squares != nullptr && lane == 0) squares[row] += square;
}

// Coordinate descent over the indices of a block: see `polish` in the joint solver.
//
// gradient [rows, width]: (W - W0) H of these columns. corner [width, width]: the block of H on its
// diagonal. keep, indices and change [rows, stride] begin at the block's first column; keep may be
// null. change: W - W0, updated with the indices. changed [rows]: how often an index changed, added.
extern "C" __global__ void polish(const float* gradients, const float* corner, const unsigned char* keep,
                                  const float* palettes, unsigned char* indices, float* change, int* changed,
                                  int rows, int width, int stride, int group_rows, int entries, int passes) {
    int row = blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES;
    int lane = threadIdx.x % LANES;
    if (row >= rows) return;
    Palette palette = palette_of(palettes, row / group_rows, entries, lane);
    float gradient[SLOTS];
    float value[SLOTS];
    float curvature[SLOTS];
    float moved[SLOTS];
    int kept[SLOTS];
    int index[SLOTS];
    for (int slot = 0; slot < SLOTS; ++slot) {
        int column = slot * LANES + lane;
        bool inside = column < width;
        gradient[slot] = inside ? gradients[(long long)row * width + column] : 0.0f;
        kept[slot] = inside && (keep == nullptr || keep[(long long)row * stride + column] != 0);
        index[slot] = inside ? indices[(long long)row * stride + column] : 0;
        value[slot] = palette.entries[index[slot]];
        curvature[slot] = inside ? corner[column * width + column] : 0.0f;
        moved[slot] = 0.0f;
    }
    int number = 0;
    for (int pass = 0; pass < passes; ++pass) {
        int before = number;
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) {
            for (int owner = 0; owner < LANES; ++owner) {
                int column = slot * LANES + owner;
                if (column >= width) break;
                float h = __shfl_sync(ALL, curvature[slot], owner);
                bool is_kept = __shfl_sync(ALL, kept[slot], owner) != 0;
                if (!is_kept || !(h > 0.0f)) continue;
                float now = __shfl_sync(ALL, value[slot], owner);
                float slope = __shfl_sync(ALL, gradient[slot], owner);
                int entry = nearest(palette, now - slope / h);
                float next = palette.entries[entry];
                float step = next - now;
                // Gains below the precision of fp32 are ignored.
                float gain = -step * (2.0f * slope + step * h);
                if (step != 0.0f && gain > 1e-5f * step * step * h) {
                    ++number;
                    if (lane == owner) {
                        index[slot] = entry;
                        value[slot] = next;
                        moved[slot] += step;
                    }
#pragma unroll
                    for (int other = 0; other < SLOTS; ++other) {
                        int at = other * LANES + lane;
                        if (at < width) gradient[other] += step * corner[column * width + at];
                    }
                }
            }
        }
        if (number == before) break;
    }
    if (number == 0) return;
    for (int slot = 0; slot < SLOTS; ++slot) {
        int column = slot * LANES + lane;
        if (column >= width) continue;
        indices[(long long)row * stride + column] = (unsigned char)index[slot];
        change[(long long)row * stride + column] += moved[slot];
    }
    if (lane == 0) changed[row] += number;
}
