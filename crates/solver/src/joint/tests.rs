//! No step of the solver raises the objective, and each finds the optimum where that can be
//! computed.

use half::f16;
use proptest::prelude::*;
use squeeze_codebook::{BitWidth, Codebook};
use squeeze_numerics::random::noise;
use tch::{Device, Kind, Tensor};

use super::problem::Problem;
use super::sorted_codebook::{Entries, Palette, SortedCodebook};
use super::*;
use crate::{InputGeometry, Windows};

/// Inputs [n, d] that a few directions dominate.
fn inputs(n: i64, d: i64, seed: u64) -> Tensor {
    normal([n, d / 3 + 1], seed).matmul(&normal([d / 3 + 1, d], seed + 100)) + 0.3 * normal([n, d], seed + 200)
}

pub(super) fn normal(size: [i64; 2], seed: u64) -> Tensor {
    noise(&size, seed, Kind::Float).unwrap()
}

/// Even numbers in [0, 1).
pub(super) fn uniform(count: usize, seed: u64) -> Vec<f32> {
    to_vec(&noise(&[count as i64], seed, Kind::Float).unwrap().special_ndtr().clamp_max(0.999_999)).unwrap()
}

/// Factors of `groups` Hessians of d inputs.
pub(super) fn factors(groups: i64, d: i64, seed: u64, order: Order) -> JointFactors {
    let geometry = Windows { stride: [1; 2], padding: [0; 2], dilation: [1; 2], groups };
    let mut hessian = Hessian::for_weight(InputGeometry::Windows(geometry), &[groups, d, 1, 1], Device::Cpu).unwrap();
    let vectors = inputs(3 * d, groups * d, seed);
    hessian.add(&vectors.tr().contiguous().view([1, groups * d, 3 * d, 1])).unwrap();
    JointFactors::new(&hessian, 0.01, order).unwrap()
}

fn problem(factors: &JointFactors, rows: usize, columns: usize, sparsity: f64, seed: u64) -> Problem<'_> {
    let original = to_vec(&normal([rows as i64, columns as i64], seed + 300)).unwrap();
    let random = uniform(rows * columns, seed + 400);
    let keep = (sparsity > 0.0).then(|| random.iter().map(|random| f64::from(*random) >= sparsity).collect());
    Problem { factors, data: Data { original, keep, columns, rows, shape: vec![rows, columns] } }
}

/// Evenly spaced palettes and random indices.
fn sorted(problem: &Problem<'_>, entries: usize, group_rows: usize) -> SortedCodebook {
    let groups = problem.data.rows / group_rows;
    let palettes: Vec<f16> =
        (0..groups * entries).map(|at| f16::from_f64(3.0 * ((at % entries) as f64 + 0.5) / entries as f64 - 1.5)).collect();
    let random = uniform(problem.data.original.len(), 500);
    let indices = random.iter().map(|random| (f64::from(*random) * entries as f64) as u8).collect();
    SortedCodebook::new(&codebook(palettes, entries, group_rows), indices)
}

fn codebook(palettes: Vec<f16>, entries: usize, group_size: usize) -> Codebook {
    let bits = BitWidth::ALL.into_iter().find(|bits| bits.entries() == entries).unwrap();
    Codebook { bits, axis: 0, group_size, vector_length: 1, palettes, scales: None }
}

fn nearest(sorted: &SortedCodebook, row: usize, value: f32) -> u8 {
    let Palette::Scalars(palette) = sorted.of_row(row) else { panic!("a palette of vectors") };
    palette.nearest([value])
}

fn value(data: &Data, sorted: &SortedCodebook, at: usize) -> f32 {
    if data.kept(at) { sorted.value(at, data.columns) } else { 0.0 }
}

pub(super) fn loss(problem: &Problem<'_>, sorted: &SortedCodebook) -> f64 {
    let data = &problem.data;
    problem.loss(|at| value(data, sorted, at)).unwrap().damped
}

/// Weights refitted on their mask; what the fit takes for their loss is their loss.
pub(super) fn refit(problem: &Problem<'_>, weight: &mut [f32], steps: usize) {
    for (part, rows) in problem.chunks() {
        let span = problem.data.span(&rows);
        let keep: Vec<bool> = span.clone().map(|at| problem.data.kept(at)).collect();
        let original = &problem.data.original[span.clone()];
        let mut fit = MaskedLeastSquares::new(problem.part(part), original, &weight[span.clone()], &keep).unwrap();
        fit.descend(steps, 0.0).unwrap();
        let again = MaskedLeastSquares::new(problem.part(part), original, &fit.weight, &keep).unwrap().losses();
        for (kept, again) in fit.losses().iter().zip(again) {
            assert!((kept - again).abs() <= 1e-4 * again + 1e-9, "{kept} and {again}");
        }
        weight[span].copy_from_slice(&fit.weight);
    }
}

pub(super) fn refit_palettes(problem: &Problem<'_>, sorted: &mut SortedCodebook, steps: usize) {
    let gradient = entries::palette_gradient(problem, sorted).unwrap();
    entries::refit_palettes(problem, sorted, &gradient, steps).unwrap();
}

/// A problem of any shape: convolution groups, rows in each, columns, sparsity, seed.
fn shapes() -> impl Strategy<Value = (i64, usize, usize, f64, u64)> {
    (1..3_i64, prop::sample::select(&[2_usize, 4, 6][..]), 2..40_usize, prop::sample::select(&[0.0, 0.4, 0.9][..]), 0..1000_u64)
}

/// A little more, for what fp32 cannot tell.
pub(super) fn not_above(after: f64, before: f64) -> bool {
    after <= before * (1.0 + 1e-5) + 1e-12
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn refit_never_raises_the_objective_and_leaves_zeros((groups, of_part, d, sparsity, seed) in shapes()) {
        let factors = factors(groups, d as i64, seed, Order::Natural);
        let problem = problem(&factors, groups as usize * of_part, d, sparsity, seed);
        let start: Vec<f32> = (0..problem.data.original.len()).map(|at| if problem.data.kept(at) { problem.data.original[at] } else { 0.0 }).collect();
        let mut before = problem.loss(|at| start[at]).unwrap().damped;
        for steps in [1, 2, 4, 8] {
            let mut weight = start.clone();
            refit(&problem, &mut weight, steps);
            prop_assert!((0..weight.len()).all(|at| problem.data.kept(at) || weight[at] == 0.0));
            let after = problem.loss(|at| weight[at]).unwrap().damped;
            prop_assert!(not_above(after, before), "{} steps: {} after {}", steps, after, before);
            before = after;
        }
    }

    #[test]
    fn palette_refit_and_polish_never_raise_the_objective(
        (groups, of_part, d, sparsity, seed) in shapes(),
        bits in 1..5_u32,
        whole in any::<bool>(),
    ) {
        let factors = factors(groups, d as i64, seed, Order::Natural);
        let rows = groups as usize * of_part;
        let problem = problem(&factors, rows, d, sparsity, seed);
        let mut sorted = sorted(&problem, 1 << bits, if whole { rows } else { 2 });
        let mut before = loss(&problem, &sorted);
        for steps in [1, 3] {
            refit_palettes(&problem, &mut sorted, steps);
            let after = loss(&problem, &sorted);
            prop_assert!(not_above(after, before), "palette: {} after {}", after, before);
            prop_assert!(sorted.values().chunks(1 << bits).all(|palette| palette.is_sorted()));
            let changed = polish::polish(&problem, &mut sorted).unwrap();
            before = after;
            let after = loss(&problem, &sorted);
            prop_assert!(not_above(after, before), "polish: {} after {}", after, before);
            prop_assert!(changed == 0 || after < before);
            before = after;
        }
    }

    #[test]
    fn where_polish_ends_no_single_change_is_better((groups, of_part, d, sparsity, seed) in shapes()) {
        let factors = factors(groups, d as i64, seed, Order::Natural);
        let rows = groups as usize * of_part;
        let problem = problem(&factors, rows, d, sparsity, seed);
        let mut sorted = sorted(&problem, 4, 2);
        let mut turns = 0;
        while polish::polish(&problem, &mut sorted).unwrap() > 0 {
            turns += 1;
            prop_assert!(turns < 200);
        }
        let least = loss(&problem, &sorted);
        for at in (0..problem.data.original.len()).filter(|at| problem.data.kept(*at)).step_by(7) {
            let old = sorted.indices[at];
            for other in 0..4 {
                sorted.indices[at] = other;
                prop_assert!(loss(&problem, &sorted) >= least * (1.0 - 1e-4));
            }
            sorted.indices[at] = old;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn swaps_lower_the_objective_and_keep_the_number_of_zeros(
        (groups, of_part, d, _, seed) in shapes(),
        of_two in any::<bool>(),
    ) {
        let factors = factors(groups, d as i64, seed, Order::Natural);
        let mut problem = problem(&factors, groups as usize * of_part, d, 0.4, seed);
        let keep = problem.data.keep.clone().unwrap();
        let mut weight: Vec<f32> = (0..keep.len()).map(|at| if keep[at] { problem.data.original[at] } else { 0.0 }).collect();
        refit(&problem, &mut weight, 8);
        let before = problem.loss(|at| weight[at]).unwrap().damped;
        let group = of_two.then_some(2);
        let effort = Effort { refit_steps: 0, exchange_turns: 4, exchange_steps: 4, ..Effort::LEAST };
        let mut new = keep.clone();
        let said = super::refit(&problem, &mut weight, &mut new, &effort, (group, 1)).unwrap();
        problem.data.keep = Some(new.clone());
        let Loss { damped: after, bare } = problem.loss(|at| weight[at]).unwrap();
        prop_assert!(not_above(after, before), "{} after {}", after, before);
        prop_assert!((said - bare).abs() <= 1e-3 * after, "it said {said} and is {bare}");
        prop_assert!((0..new.len()).all(|at| new[at] || weight[at] == 0.0));
        let kept = |keep: &[bool]| keep.iter().filter(|keep| **keep).count();
        for (new, old) in new.chunks(d).zip(keep.chunks(d)) {
            prop_assert_eq!(kept(new), kept(old));
            if of_two {
                let pairs = new.chunks_exact(2).zip(old.chunks_exact(2));
                prop_assert!(pairs.into_iter().all(|(new, old)| kept(new) == kept(old)));
            }
        }
    }
}

/// Where inputs are much alike, a weight that comes must not begin where it is to end: all rows
/// would get so much worse by it that a few steps do not bring them back.
#[test]
fn swaps_pay_within_a_few_steps_where_inputs_are_alike() {
    let (d, rows) = (384, 64);
    // A spectrum that falls as the ranks' roots do.
    let ranks = Tensor::arange(d as i64, (Kind::Float, Device::Cpu)) + 1.0;
    let mix = normal([d as i64; 2], 1) * ranks.rsqrt().unsqueeze(1);
    let mut hessian = Hessian::new(d as i64, Device::Cpu).unwrap();
    hessian.add(&(normal([1500, d as i64], 2).matmul(&mix) + 0.3 * normal([1500, d as i64], 3))).unwrap();
    let factors = JointFactors::new(&hessian, 0.01, Order::Natural).unwrap();
    let mut problem = problem(&factors, rows, d, 0.0, 7);
    let part = problem.part(0);
    // The mask that is best if each weight goes alone.
    let cost = |at: usize| f64::from(problem.data.original[at].powi(2) * part.scale[at % d]);
    let mut keep = vec![true; rows * d];
    for row in 0..rows {
        let mut columns: Vec<usize> = (row * d..(row + 1) * d).collect();
        columns.sort_by(|a, b| cost(*a).total_cmp(&cost(*b)));
        columns[..d * 2 / 5].iter().for_each(|at| keep[*at] = false);
    }
    let mut weight: Vec<f32> = (0..keep.len()).map(|at| if keep[at] { problem.data.original[at] } else { 0.0 }).collect();
    problem.data.keep = Some(keep.clone());
    refit(&problem, &mut weight, 8);
    let mut alone = weight.clone();
    refit(&problem, &mut alone, 40);
    let refitted = problem.loss(|at| alone[at]).unwrap().damped;
    let effort = Effort { refit_steps: 0, exchange_turns: 3, exchange_steps: 4, ..Effort::LEAST };
    super::refit(&problem, &mut weight, &mut keep, &effort, (None, 1)).unwrap();
    problem.data.keep = Some(keep);
    // The comparison is about the masks and not about the number of steps.
    refit(&problem, &mut weight, 40);
    let after = problem.loss(|at| weight[at]).unwrap().damped;
    assert!(after < 0.9 * refitted, "{refitted}, with swaps {after}");
}

/// The damped H of the first group in fp64.
pub(super) fn whole(factors: &JointFactors) -> Tensor {
    factors.parts[0].h.symmetric().unwrap().to_kind(Kind::Double)
}

#[test]
fn many_steps_of_refit_are_the_exact_solution() {
    for sparsity in [0.3, 0.6] {
        let factors = factors(1, 24, 5, Order::Natural);
        let problem = problem(&factors, 6, 24, sparsity, 5);
        let mut weight = problem.data.original.clone();
        weight.iter_mut().enumerate().filter(|(at, _)| !problem.data.kept(*at)).for_each(|(_, weight)| *weight = 0.0);
        refit(&problem, &mut weight, 60);
        let h = whole(&factors);
        for row in 0..6 {
            let kept: Vec<i64> = (0..24).filter(|column| problem.data.kept(row * 24 + *column as usize)).collect();
            let kept = Tensor::from_slice(&kept);
            let original = Tensor::from_slice(&problem.data.original[row * 24..(row + 1) * 24]).to_kind(Kind::Double);
            // H_kk w_k = (H w0)_k.
            let right = h.matmul(&original).index_select(0, &kept).unsqueeze(1);
            let exact = Tensor::linalg_solve(&h.index_select(0, &kept).index_select(1, &kept), &right, true).squeeze_dim(1);
            let ours = Tensor::from_slice(&weight[row * 24..(row + 1) * 24]).to_kind(Kind::Double).index_select(0, &kept);
            let off = ((ours - &exact).norm() / exact.norm()).double_value(&[]);
            assert!(off < 1e-3, "row {row}: {off:.1e}");
        }
    }
}

#[test]
fn many_steps_of_palette_refit_are_the_least_squares_solution() {
    let (d, rows, entries) = (30, 4, 4);
    let factors = factors(1, d as i64, 6, Order::Natural);
    let problem = problem(&factors, rows, d, 0.4, 6);
    let mut sorted = sorted(&problem, entries, rows);
    let h = whole(&factors);
    // One column for each entry: what its weights change of the whole [o d] vector.
    let mut matrix = Tensor::zeros([entries as i64; 2], (Kind::Double, Device::Cpu));
    let mut right = Tensor::zeros([entries as i64, 1], (Kind::Double, Device::Cpu));
    for row in 0..rows {
        let mut ones = vec![0.0_f64; entries * d];
        for column in (0..d).filter(|column| problem.data.kept(row * d + column)) {
            ones[usize::from(sorted.indices[row * d + column]) * d + column] = 1.0;
        }
        let ones = Tensor::from_slice(&ones).reshape([entries as i64, d as i64]);
        let original = Tensor::from_slice(&problem.data.original[row * d..(row + 1) * d]).to_kind(Kind::Double).unsqueeze(1);
        matrix += ones.matmul(&h).matmul(&ones.tr());
        right += ones.matmul(&h).matmul(&original);
    }
    let exact: Vec<f64> = Vec::try_from(Tensor::linalg_solve(&matrix, &right, true).squeeze_dim(1)).unwrap();
    let mut exact = exact;
    exact.sort_by(f64::total_cmp);
    refit_palettes(&problem, &mut sorted, 40);
    for (ours, exact) in sorted.values().iter().zip(&exact) {
        assert!((f64::from(*ours) - exact).abs() < 2e-3 * (1.0 + exact.abs()), "{ours} and {exact}");
    }
}

#[test]
fn a_sweep_beats_the_nearest_entries() {
    let mut better = 0;
    for seed in 0..10 {
        let factors = factors(2, 60, seed, Order::Natural);
        let problem = problem(&factors, 8, 60, 0.3, seed);
        let mut sorted = sorted(&problem, 8, 4);
        let nearest = (0..problem.data.original.len()).map(|at| nearest(&sorted, at / 60, problem.data.original[at])).collect();
        sorted.indices = nearest;
        let before = loss(&problem, &sorted);
        sweep::sweep(&problem, &problem.data.original, &mut sorted).unwrap();
        better += usize::from(loss(&problem, &sorted) < before);
    }
    assert_eq!(better, 10);
}

#[test]
fn columns_come_back_from_activation_order() {
    let factors = factors(2, 50, 3, Order::Activation);
    for part in &factors.parts {
        assert!(part.diagonal.is_sorted_by(|a, b| a >= b));
    }
    let natural = Natural::new(&factors, 6, 50);
    let numbers: Vec<u32> = (0..300).collect();
    let mut there = numbers.clone();
    natural.sort(&mut there);
    assert_ne!(there, numbers);
    natural.restore(&mut there);
    assert_eq!(there, numbers);
}

#[test]
fn entries_are_the_nearest_whatever_their_number() {
    for bits in [1, 3, 6, 8] {
        let entries = 1_usize << bits;
        let palette: Vec<f16> = (0..entries).map(|at| f16::from_f64((at as f64).powf(1.5) / 7.0 - 1.0)).collect();
        let sorted = SortedCodebook::new(&codebook(palette.clone(), entries, 1), vec![0]);
        for at in 0..2000 {
            let value = at as f32 * 0.3 - 2.0;
            let distance = |entry: &f16| (entry.to_f32() - value).abs();
            let best = palette.iter().map(distance).fold(f32::INFINITY, f32::min);
            assert!(distance(&palette[usize::from(nearest(&sorted, 0, value))]) <= best * (1.0 + 1e-6));
        }
    }
}
