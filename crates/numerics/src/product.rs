//! Matrix products on the CPU whose results do not depend on the number of threads.
//!
//! The products are computed by [faer](https://docs.rs/faer). faer cuts the inner dimension into
//! pieces of a fixed length and gives each thread its own part of the result, so that the rounding
//! does not depend on the number of threads. The rounding of MKL does, even with
//! `MKL_CBWR=AUTO,STRICT`, if the left matrix has few rows, as time embeddings have. On AMD's
//! processors faer is also the faster library (benches/RESULTS.md).
//!
//! Products on a GPU, in fp64, and of tensors that require gradients are libtorch's.

use std::ops::Range;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use squeeze_base::error::Result;
use tch::{Device, Kind, Tensor};

/// The change that a product makes to its target matrix.
#[derive(Clone, Copy, PartialEq)]
enum Change {
    Replace,
    Add,
    Subtract,
}

/// A B for A [m, k] and B [k, n]: [m, n].
pub fn product(left: &Tensor, right: &Tensor) -> Result<Tensor> {
    if faer_serves(left) && faer_serves(right) {
        let target = left.f_new_empty([left.size2()?.0, right.size2()?.1], (Kind::Float, Device::Cpu))?;
        if faer_product(&target, left, right, Change::Replace)? {
            return Ok(target);
        }
    }
    Ok(left.f_mm(right)?)
}

/// T + A B in the place of T [m, n], for A [m, k] and B [k, n]. On a CUDA GPU A and B may be fp16
/// or bf16 beside a T in fp32: their products are exact in fp32, and so are not rounded before they
/// are summed.
pub fn add_product(target: &Tensor, left: &Tensor, right: &Tensor) -> Result<()> {
    if sums_halves(target.device(), left.f_kind()?) && target.f_kind()? == Kind::Float {
        let _ = target.f_addmm_dtype_out(target, left, right, Kind::Float)?;
        return Ok(());
    }
    if faer_product(target, left, right, Change::Add)? {
        return Ok(());
    }
    let mut target = target.shallow_clone();
    if faer_serves(&target) {
        // faer did not take the product, for example because the target shares memory with a
        // factor: the product is computed in new memory first.
        let _ = target.f_add_(&product(left, right)?)?;
    } else {
        let _ = target.f_addmm_(left, right)?;
    }
    Ok(())
}

/// Whether [`add_product`] takes factors of this dtype beside a sum in fp32.
#[must_use]
pub fn sums_halves(device: Device, kind: Kind) -> bool {
    matches!(device, Device::Cuda(_)) && matches!(kind, Kind::Half | Kind::BFloat16)
}

/// T - A B in the place of T [m, n], for A [m, k] and B [k, n].
pub fn subtract_product(target: &Tensor, left: &Tensor, right: &Tensor) -> Result<()> {
    if !faer_product(target, left, right, Change::Subtract)? {
        let _ = target.shallow_clone().f_sub_(&product(left, right)?)?;
    }
    Ok(())
}

/// X W^T + b for X [.., d], W [o, d] and b `[o]`: [.., o].
///
/// On a CPU fp16 and bf16 are multiplied and added in fp32, and the sum is rounded once.
pub fn linear(input: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (o, d) = weight.size2()?;
    let kind = input.f_kind()?;
    if let Some(output) = in_fp32(input, weight, bias, linear)? {
        return Ok(output);
    }
    if !faer_serves(input) || input.size().last() != Some(&d) {
        return Ok(input.f_linear(weight, bias)?);
    }
    let rows = input.f_reshape([-1, d])?;
    let output = match bias {
        None => product(&rows, &weight.f_transpose(0, 1)?)?,
        Some(bias) => {
            let mut output = input.f_new_empty([rows.size2()?.0, o], (kind, input.device()))?;
            output.f_copy_(bias)?;
            add_product(&output, &rows, &weight.f_transpose(0, 1)?)?;
            output
        }
    };
    let mut size = input.size();
    size.pop();
    size.push(o);
    Ok(output.f_view(size.as_slice())?)
}

/// Computes a layer of fp16 or bf16 on a CPU by `layer` in fp32, rounding once; `None` if the input
/// has another dtype or device, or requires gradients.
pub fn in_fp32(
    input: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    layer: impl Fn(&Tensor, &Tensor, Option<&Tensor>) -> Result<Tensor>,
) -> Result<Option<Tensor>> {
    let kind = input.f_kind()?;
    if input.device() != Device::Cpu || !matches!(kind, Kind::Half | Kind::BFloat16) || input.requires_grad() {
        return Ok(None);
    }
    let wide = |tensor: &Tensor| tensor.f_to_kind(Kind::Float);
    let bias = bias.map(wide).transpose()?;
    Ok(Some(layer(&wide(input)?, &wide(weight)?, bias.as_ref())?.f_to_kind(kind)?))
}

/// The number of multiply-adds from which several threads are faster than one.
const MANY: f64 = 8e6;

/// Whether faer computes products of this tensor: fp32 on the CPU, without gradients.
fn faer_serves(tensor: &Tensor) -> bool {
    tensor.device() == Device::Cpu && tensor.f_kind().is_ok_and(|kind| kind == Kind::Float) && !tensor.requires_grad()
}

/// Computes the product in `target`. Returns false, with nothing changed, where libtorch must
/// compute it or report the error.
fn faer_product(target: &Tensor, left: &Tensor, right: &Tensor, change: Change) -> Result<bool> {
    if ![target, left, right].into_iter().all(faer_serves) {
        return Ok(false);
    }
    let (Some(to), Some(a), Some(b)) = (View::of(target), View::of(left), View::of(right)) else { return Ok(false) };
    let fits = a.columns == b.rows && to.rows == a.rows && to.columns == b.columns;
    if !fits || !to.is_injective() || to.overlaps(&a) || to.overlaps(&b) {
        return Ok(false);
    }
    let accumulate = if change == Change::Replace { Accum::Replace } else { Accum::Add };
    let factor = if change == Change::Subtract { -1.0 } else { 1.0 };
    let work = to.rows as f64 * to.columns as f64 * a.columns as f64;
    // In a product with a vector, faer gives each thread a part of the inner dimension, so that the
    // sum would depend on the number of threads.
    let is_vector = to.rows == 1 || to.columns == 1;
    let threads = if work < MANY || is_vector { Par::Seq } else { Par::rayon(0) };
    // SAFETY: each view is of the fp32 elements of a tensor on the CPU, which lie in its storage by
    // libtorch's own rules (views are only made of sizes and strides that do) and which the
    // borrowed tensors keep alive. The target's elements are all different ones and share no memory
    // with the others' (checked above), and no other thread uses them: tensors are not `Sync`.
    unsafe {
        let to = MatMut::from_raw_parts_mut(to.data, to.rows, to.columns, to.steps[0], to.steps[1]);
        let a = MatRef::from_raw_parts(a.data.cast_const(), a.rows, a.columns, a.steps[0], a.steps[1]);
        let b = MatRef::from_raw_parts(b.data.cast_const(), b.rows, b.columns, b.steps[0], b.steps[1]);
        matmul(to, accumulate, a, b, factor, threads);
    }
    Ok(true)
}

/// The position of a matrix's elements in memory.
struct View {
    data: *mut f32,
    rows: usize,
    columns: usize,
    /// The distance from row to row and from column to column, in elements.
    steps: [isize; 2],
}

impl View {
    /// The view of a matrix; `None` for a tensor that is not a matrix or has no elements.
    fn of(tensor: &Tensor) -> Option<Self> {
        let [rows, columns] = tensor.size()[..] else { return None };
        let [down, across] = tensor.stride()[..] else { return None };
        let step = |step: i64| isize::try_from(step).ok().filter(|step| *step >= 0);
        let view = View {
            data: tensor.data_ptr().cast(),
            rows: usize::try_from(rows).ok()?,
            columns: usize::try_from(columns).ok()?,
            steps: [step(down)?, step(across)?],
        };
        (view.rows > 0 && view.columns > 0 && !view.data.is_null()).then_some(view)
    }

    /// Whether each position of the matrix is an element of its own in memory.
    fn is_injective(&self) -> bool {
        let [down, across] = self.steps;
        let (rows, columns) = (self.rows as isize, self.columns as isize);
        let by_rows = (across > 0 || columns == 1) && (down > (columns - 1) * across || rows == 1);
        let by_columns = (down > 0 || rows == 1) && (across > (rows - 1) * down || columns == 1);
        by_rows || by_columns
    }

    /// The addresses from the first element to the end of the last.
    fn extent(&self) -> Range<usize> {
        let last = (self.rows - 1) * self.steps[0].unsigned_abs() + (self.columns - 1) * self.steps[1].unsigned_abs();
        let start = self.data as usize;
        start..start + (last + 1) * size_of::<f32>()
    }

    fn overlaps(&self, other: &View) -> bool {
        let (this, other) = (self.extent(), other.extent());
        this.start < other.end && other.start < this.end
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    fn numbers(size: &[i64], seed: u64) -> Tensor {
        crate::random::noise(size, seed, Kind::Float).unwrap()
    }

    fn close(ours: &Tensor, exact: &Tensor) {
        assert_eq!(ours.size(), exact.size());
        let off = (ours.to_kind(Kind::Double) - exact).norm().double_value(&[]) / exact.norm().double_value(&[]).max(1e-30);
        assert!(off < 1e-6, "{:?}: {off:.1e}", ours.size());
    }

    fn exact(left: &Tensor, right: &Tensor) -> Tensor {
        left.to_kind(Kind::Double).matmul(&right.to_kind(Kind::Double))
    }

    #[test]
    fn products_of_all_shapes_and_strides_are_right() {
        for (m, k, n) in [(1, 1, 1), (3, 5, 2), (64, 128, 96), (333, 77, 129), (1, 700, 40), (500, 300, 200)] {
            let (a, b, c) = (numbers(&[m, k], 1), numbers(&[k, n], 2), numbers(&[m, n], 3));
            let turned = |tensor: &Tensor| {
                let size = tensor.size();
                let mut other = tensor.new_zeros([size[1], size[0]], (Kind::Float, Device::Cpu));
                other.copy_(&tensor.tr());
                other.tr()
            };
            let inner = |tensor: &Tensor| {
                let size = tensor.size();
                let around = tensor.new_zeros([size[0] + 3, size[1] + 5], (Kind::Float, Device::Cpu));
                around.narrow(0, 1, size[0]).narrow(1, 2, size[1]).copy_(tensor);
                around.narrow(0, 1, size[0]).narrow(1, 2, size[1])
            };
            for a in [a.copy(), turned(&a), inner(&a)] {
                for b in [b.copy(), turned(&b), inner(&b)] {
                    let expected = exact(&a, &b);
                    close(&product(&a, &b).unwrap(), &expected);
                    for target in [c.copy(), turned(&c), inner(&c)] {
                        add_product(&target, &a, &b).unwrap();
                        close(&target, &(c.to_kind(Kind::Double) + &expected));
                        subtract_product(&target, &a, &b).unwrap();
                        subtract_product(&target, &a, &b).unwrap();
                        close(&target, &(c.to_kind(Kind::Double) - &expected));
                    }
                }
            }
        }
    }

    #[test]
    fn linear_is_libtorchs() {
        for size in [&[40_i64][..], &[7, 40], &[2, 77, 40], &[1, 2, 3, 40], &[0, 40]] {
            let (x, w, b) = (numbers(size, 4), numbers(&[30, 40], 5), numbers(&[30], 6));
            for bias in [None, Some(&b)] {
                let double = |tensor: &Tensor| tensor.to_kind(Kind::Double);
                close(&linear(&x, &w, bias).unwrap(), &double(&x).linear(&double(&w), bias.map(double).as_ref()));
            }
        }
    }

    /// Matrices that faer must not be given go to libtorch, which computes or refuses them.
    #[test]
    fn shared_memory_other_dtypes_gradients_and_wrong_shapes() {
        let a = numbers(&[8, 8], 7);
        let expected = a.to_kind(Kind::Double) + exact(&a, &a);
        let same = a.copy();
        add_product(&same, &a, &a).unwrap();
        close(&same, &expected);
        // The target is the right half of the matrix that the left factor is a part of.
        let whole = numbers(&[8, 16], 8);
        let (left, right) = (whole.narrow(1, 0, 8), whole.narrow(1, 8, 8));
        let expected = right.to_kind(Kind::Double) + exact(&left, &a);
        add_product(&right, &left, &a).unwrap();
        close(&right, &expected);
        // All rows the same memory.
        let one = numbers(&[1, 8], 9);
        assert!(add_product(&one.expand([8, 8], false), &a, &a).is_err());
        assert!(product(&a, &numbers(&[7, 8], 10)).is_err());
        let double = a.to_kind(Kind::Double);
        close(&product(&double, &double).unwrap(), &exact(&a, &a));
        let learns = a.copy().set_requires_grad(true);
        let y = linear(&learns, &a, None).unwrap().sum(Kind::Float);
        let gradient = &Tensor::run_backward(&[y], std::slice::from_ref(&learns), false, false)[0];
        close(gradient, &exact(&Tensor::ones([8, 8], (Kind::Float, Device::Cpu)), &a));
    }

    #[test]
    fn the_same_numbers_on_any_number_of_threads() {
        let threads = tch::get_num_threads();
        let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        for (m, k, n) in
            [(512, 640, 333), (16, 2816, 640), (77, 2048, 1280), (1200, 128, 96), (1, 4096, 4096), (4096, 2048, 1), (16, 16, 128)]
        {
            let run = || {
                let (a, b, sum) = (numbers(&[m, k], 11), numbers(&[n, k], 12), numbers(&[m, n], 13));
                add_product(&sum, &a, &b.tr()).unwrap();
                // The target is a part of the matrix that the left factor is a part of.
                let whole = numbers(&[m, k + n], 14);
                subtract_product(&whole.narrow(1, k, n), &whole.narrow(1, 0, k), &b.tr()).unwrap();
                let sum = product(&a, &b.tr()).unwrap() + sum + whole.narrow(1, k, n);
                Vec::<f32>::try_from(sum.flatten(0, -1)).unwrap()
            };
            let expected = pool(1).install(run);
            for count in [2, 3, 7] {
                tch::set_num_threads(count as i32);
                assert!(pool(count).install(run) == expected, "{m} {k} {n} on {count} threads");
            }
            tch::set_num_threads(threads);
        }
    }
}
