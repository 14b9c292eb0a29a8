// fp16 by its bits, without CUDA's headers, which users do not have.

__device__ float float_of(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// The nearest fp16 number; a zero has no sign.
__device__ unsigned short half_of(double value) {
    unsigned short bits;
    asm("cvt.rn.f16.f64 %0, %1;" : "=h"(bits) : "d"(value));
    return bits == 0x8000 ? (unsigned short)0 : bits;
}
