//! One preconditioned conjugate gradient step for one row, in SIMD.

use pulp::{Arch, Simd, WithSimd};

/// The state of one row. All slices have length d.
pub(super) struct Row<'a> {
    /// W.
    pub weight: &'a mut [f32],
    /// G = (W - W0) H.
    pub gradient: &'a mut [f32],
    /// The direction of the next step.
    pub direction: &'a mut [f32],
    /// 1 where a weight is kept, else 0.
    pub mask: &'a [f32],
    /// 1 / H_jj, 0 where H_jj is.
    pub conditioner: &'a [f32],
}

impl Row<'_> {
    /// Sets the first direction: z = r / diag(H), where r is -G of the kept weights. Returns r . z.
    pub(super) fn begin(self) -> f64 {
        Arch::new().dispatch(Turn { row: self, before: 0.0 })
    }

    /// Steps along the direction, whose product with H is `product`, to the minimum of the row's
    /// objective. Then sets the next direction, z + (r . z / `before`) direction. Returns the new r
    /// . z and the decrease of the objective.
    pub(super) fn step(self, product: &[f32], before: f64) -> (f64, f64) {
        Arch::new().dispatch(Step { row: self, product, before })
    }
}

/// The scalar product of two vectors.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f64 {
    Arch::new().dispatch(Dot { a, b })
}

/// A quotient; 0 where it is not finite, which happens when the row is already solved.
fn share(a: f64, b: f64) -> f32 {
    let share = (a / b) as f32;
    if b > 0.0 && share.is_finite() { share } else { 0.0 }
}

struct Dot<'a> {
    a: &'a [f32],
    b: &'a [f32],
}

impl WithSimd for Dot<'_> {
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f64 {
        /// The number of products that are summed in fp32 before they are added to the fp64 sum.
        const PIECE: usize = 128;
        let mut sum = 0.0;
        // A loop, because closures are not compiled for the SIMD instructions of `simd`.
        for (a, b) in self.a.chunks(PIECE).zip(self.b.chunks(PIECE)) {
            sum += f64::from(short_dot(simd, a, b));
        }
        sum
    }
}

/// The scalar product in fp32.
#[inline(always)]
fn short_dot<S: Simd>(simd: S, a: &[f32], b: &[f32]) -> f32 {
    let ((a, rest_a), (b, rest_b)) = (S::as_simd_f32s(a), S::as_simd_f32s(b));
    let mut sum = simd.splat_f32s(0.0);
    for (a, b) in a.iter().zip(b) {
        sum = simd.mul_add_e_f32s(*a, *b, sum);
    }
    simd.reduce_sum_f32s(sum) + rest_a.iter().zip(rest_b).map(|(a, b)| a * b).sum::<f32>()
}

/// a += factor * b.
#[inline(always)]
fn add<S: Simd>(simd: S, a: &mut [f32], factor: f32, b: &[f32]) {
    let ((a, rest_a), (b, rest_b)) = (S::as_mut_simd_f32s(a), S::as_simd_f32s(b));
    let factors = simd.splat_f32s(factor);
    for (a, b) in a.iter_mut().zip(b) {
        *a = simd.mul_add_e_f32s(factors, *b, *a);
    }
    rest_a.iter_mut().zip(rest_b).for_each(|(a, b)| *a += factor * b);
}

struct Step<'a> {
    row: Row<'a>,
    product: &'a [f32],
    before: f64,
}

impl WithSimd for Step<'_> {
    type Output = (f64, f64);

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> (f64, f64) {
        let Step { row, product, before } = self;
        let curvature = Dot { a: row.direction, b: product }.with_simd(simd);
        let length = share(before, curvature);
        add(simd, row.weight, length, row.direction);
        add(simd, row.gradient, length, product);
        (Turn { row, before }.with_simd(simd), f64::from(length) * before)
    }
}

struct Turn<'a> {
    row: Row<'a>,
    before: f64,
}

impl WithSimd for Turn<'_> {
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f64 {
        /// The number of elements that are summed in fp32, as for [`Dot`].
        const PIECE: usize = 128;
        let Row { gradient, direction, mask, conditioner, .. } = self.row;
        let mut now = 0.0;
        let pieces = gradient.chunks(PIECE).zip(mask.chunks(PIECE)).zip(conditioner.chunks(PIECE));
        for ((gradient, mask), conditioner) in pieces {
            let ((g, rest_g), (m, rest_m), (c, rest_c)) =
                (S::as_simd_f32s(gradient), S::as_simd_f32s(mask), S::as_simd_f32s(conditioner));
            let mut sum = simd.splat_f32s(0.0);
            for ((g, m), c) in g.iter().zip(m).zip(c) {
                sum = simd.mul_add_e_f32s(simd.mul_f32s(*g, *m), simd.mul_f32s(*g, *c), sum);
            }
            let rest: f32 = rest_g.iter().zip(rest_m).zip(rest_c).map(|((g, m), c)| g * m * g * c).sum();
            now += f64::from(simd.reduce_sum_f32s(sum) + rest);
        }
        let keep_on = share(now, self.before);
        let ((direction, rest_d), (g, rest_g)) = (S::as_mut_simd_f32s(direction), S::as_simd_f32s(gradient));
        let ((m, rest_m), (c, rest_c)) = (S::as_simd_f32s(mask), S::as_simd_f32s(conditioner));
        let factor = simd.splat_f32s(keep_on);
        for (((direction, g), m), c) in direction.iter_mut().zip(g).zip(m).zip(c) {
            let z = simd.mul_f32s(simd.mul_f32s(*g, *m), *c);
            *direction = simd.sub_f32s(simd.mul_f32s(factor, *direction), z);
        }
        for (((direction, g), m), c) in rest_d.iter_mut().zip(rest_g).zip(rest_m).zip(rest_c) {
            *direction = keep_on * *direction - g * m * c;
        }
        now
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A step, number by number in fp64.
    fn plainly(row: &Row<'_>, product: &[f32], before: f64) -> (Vec<f64>, Vec<f64>, Vec<f64>, f64) {
        let double = |values: &[f32]| values.iter().map(|value| f64::from(*value)).collect::<Vec<f64>>();
        let (mut weight, mut gradient, mut direction) = (double(row.weight), double(row.gradient), double(row.direction));
        let product = double(product);
        let curvature: f64 = direction.iter().zip(&product).map(|(a, b)| a * b).sum();
        let length = if curvature > 0.0 { before / curvature } else { 0.0 };
        for at in 0..weight.len() {
            weight[at] += length * direction[at];
            gradient[at] += length * product[at];
        }
        let z: Vec<f64> =
            (0..weight.len()).map(|at| -gradient[at] * f64::from(row.mask[at]) * f64::from(row.conditioner[at])).collect();
        let now: f64 = -gradient.iter().zip(&z).map(|(a, b)| a * b).sum::<f64>();
        for at in 0..weight.len() {
            direction[at] = z[at] + now / before * direction[at];
        }
        (weight, gradient, direction, now)
    }

    fn near(ours: &[f32], theirs: &[f64]) -> bool {
        let scale = theirs.iter().fold(1e-3, |most: f64, value| most.max(value.abs()));
        ours.iter().zip(theirs).all(|(ours, theirs)| (f64::from(*ours) - theirs).abs() < 1e-4 * scale)
    }

    proptest! {
        #[test]
        fn a_step_is_what_it_says(numbers in prop::collection::vec((-1.0f32..1.0, -1.0f32..1.0, any::<bool>(), 0.1f32..2.0), 1..300)) {
            let column = |pick: fn(&(f32, f32, bool, f32)) -> f32| numbers.iter().map(pick).collect::<Vec<f32>>();
            let (mut weight, mut gradient) = (column(|n| n.0), column(|n| n.1));
            let (mask, conditioner) = (column(|n| f32::from(u8::from(n.2))), column(|n| n.3));
            let mut direction: Vec<f32> = column(|n| n.0 + 0.5 * n.1);
            let product: Vec<f32> = direction.iter().map(|value| 1.5 * value).collect();
            let row = Row { weight: &mut weight, gradient: &mut gradient, direction: &mut direction, mask: &mask, conditioner: &conditioner };
            let expected = plainly(&row, &product, 0.7);
            let (now, lower) = row.step(&product, 0.7);
            prop_assert!(near(&weight, &expected.0) && near(&gradient, &expected.1) && near(&direction, &expected.2));
            prop_assert!((now - expected.3).abs() < 1e-4 * (1.0 + expected.3) && lower >= 0.0);
        }

        #[test]
        fn dots_are_those_of_fp64(numbers in prop::collection::vec((-1.0f32..1.0, -1.0f32..1.0), 0..700)) {
            let (a, b): (Vec<f32>, Vec<f32>) = numbers.into_iter().unzip();
            let exact: f64 = a.iter().zip(&b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            prop_assert!((dot(&a, &b) - exact).abs() < 1e-4);
        }
    }
}
