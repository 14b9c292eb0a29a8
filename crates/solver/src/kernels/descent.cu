// A step of conjugate gradients in many rows at once. A block of threads works on one row.

#define WORKERS 256

// The sum of a number of each thread of the block, in an order that is always the same.
__device__ double sum_of_block(double number, double* sums) {
    __syncthreads();
    sums[threadIdx.x] = number;
    for (int half = WORKERS / 2; half > 0; half /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    __syncthreads();
    return sums[0];
}

// a / b; 0 where it is not finite or b is not positive.
__device__ double share_of(double a, double b) {
    double share = a / b;
    return b > 0.0 && share - share == 0.0 ? share : 0.0;
}

// The step along `directions`, whose products with H are `products`: it updates weights and
// gradients, and makes the next direction, conjugate to this one.
//
// Matrices are [rows, width]. mask: 1 where a weight is kept, else 0. conditioner [width]: the
// reciprocal of H's diagonal. before [rows]: the dot product of the gradient with the conditioned
// gradient, which is updated. lower [rows]: by how much the step has lowered the objective.
extern "C" __global__ void descend(float* weights, float* gradients, float* directions, const float* products, const float* mask,
                                   const float* conditioner, double* before, double* lower, int rows, int width) {
    __shared__ double sums[WORKERS];
    int row = blockIdx.x;
    if (row >= rows) return;
    long long start = (long long)row * width;
    double curvature = 0.0;
    for (int column = threadIdx.x; column < width; column += WORKERS) {
        curvature += (double)(directions[start + column] * products[start + column]);
    }
    curvature = sum_of_block(curvature, sums);
    double was = before[row];
    double length = share_of(was, curvature);
    float step = (float)length;
    double now = 0.0;
    for (int column = threadIdx.x; column < width; column += WORKERS) {
        long long at = start + column;
        float gradient = gradients[at] + step * products[at];
        weights[at] += step * directions[at];
        gradients[at] = gradient;
        now += (double)(gradient * (gradient * mask[at] * conditioner[column]));
    }
    now = sum_of_block(now, sums);
    float kept = (float)share_of(now, was);
    for (int column = threadIdx.x; column < width; column += WORKERS) {
        long long at = start + column;
        directions[at] = directions[at] * kept - gradients[at] * mask[at] * conditioner[column];
    }
    if (threadIdx.x == 0) {
        before[row] = now;
        lower[row] = length * was;
    }
}
