//! The steps of the solver on palettes of vectors.

use half::f16;
use proptest::prelude::*;
use squeeze_codebook::{BitWidth, Codebook, Grouping, NmRatio, PaletteOptions, PruneOptions};
use tch::{Kind, Tensor};

use super::factors::Order;
use super::problem::{Data, Problem};
use super::sorted_codebook::{Entries, Palette, SortedCodebook};
use super::tests::{factors, loss, normal, not_above, refit, refit_palettes, uniform, whole};
use super::*;

/// A problem whose mask keeps or prunes whole vectors of `length` rows.
fn problem(factors: &JointFactors, rows: usize, columns: usize, length: usize, seed: u64) -> Problem<'_> {
    let original = to_vec(&normal([rows as i64, columns as i64], seed + 300)).unwrap();
    let random = uniform(rows / length * columns, seed + 400);
    let keep = random.chunks(columns).flat_map(|row| row.repeat(length)).map(|random| random >= 0.4);
    let keep = if seed.is_multiple_of(3) { None } else { Some(keep.collect()) };
    Problem { factors, data: Data { original, keep, columns, rows, shape: vec![rows, columns] } }
}

/// Random palettes of 2^bits vectors, and random indices.
fn sorted(problem: &Problem<'_>, bits: u8, length: usize, group_rows: usize, seed: u64) -> SortedCodebook {
    let bits = BitWidth::try_from(bits).unwrap();
    let Data { rows, columns, .. } = problem.data;
    let count = rows / group_rows * bits.entries() * length;
    let palettes = to_vec(&normal([count as i64, 1], seed + 500)).unwrap().into_iter().map(f16::from_f32).collect();
    let random = uniform(rows / length * columns, seed + 600);
    let indices = random.iter().map(|random| (f64::from(*random) * bits.entries() as f64) as u8).collect();
    let codebook = Codebook { bits, axis: 0, group_size: group_rows, vector_length: length, palettes, scales: None };
    SortedCodebook::new(&codebook, indices)
}

/// Convolution groups, vectors in each, vector length, columns, bits, seed.
fn shapes() -> impl Strategy<Value = (i64, usize, usize, usize, u8, u64)> {
    (1..3_i64, 1..4_usize, prop::sample::select(&[2_usize, 4][..]), 2..40_usize, 1..4_u8, 0..1000_u64)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn no_step_raises_the_objective((groups, vectors, length, d, bits, seed) in shapes(), whole in any::<bool>()) {
        let factors = factors(groups, d as i64, seed, Order::Natural);
        let rows = groups as usize * vectors * length;
        let problem = problem(&factors, rows, d, length, seed);
        let mut sorted = sorted(&problem, bits, length, if whole { rows } else { length }, seed);
        let mut before = loss(&problem, &sorted);
        for steps in [1, 3] {
            refit_palettes(&problem, &mut sorted, steps);
            let after = loss(&problem, &sorted);
            prop_assert!(not_above(after, before), "palette: {} after {}", after, before);
            let changed = polish::polish(&problem, &mut sorted).unwrap();
            before = after;
            let after = loss(&problem, &sorted);
            prop_assert!(not_above(after, before), "polish: {} after {}", after, before);
            prop_assert!(changed.is_multiple_of(length) && (changed == 0 || after < before));
            before = after;
        }
    }

    #[test]
    fn where_polish_ends_no_other_entry_is_better((groups, vectors, length, d, bits, seed) in shapes()) {
        let factors = factors(groups, d as i64, seed, Order::Natural);
        let problem = problem(&factors, groups as usize * vectors * length, d, length, seed);
        let mut sorted = sorted(&problem, bits, length, length, seed);
        let mut turns = 0;
        while polish::polish(&problem, &mut sorted).unwrap() > 0 {
            turns += 1;
            prop_assert!(turns < 200);
        }
        let least = loss(&problem, &sorted);
        for at in (0..sorted.indices.len()).filter(|at| problem.data.kept(at / d * length * d + at % d)).step_by(7) {
            let old = sorted.indices[at];
            for other in 0..sorted.entries as u8 {
                sorted.indices[at] = other;
                prop_assert!(loss(&problem, &sorted) >= least * (1.0 - 1e-4));
            }
            sorted.indices[at] = old;
        }
    }

    #[test]
    fn swaps_lower_the_objective_and_take_whole_vectors(
        (groups, vectors, length, d, _, seed) in shapes(),
        of_two in any::<bool>(),
    ) {
        let factors = factors(groups, d as i64, seed, Order::Natural);
        // A seed with a mask.
        let mut problem = problem(&factors, groups as usize * vectors * length, d, length, 3 * seed + 1);
        let keep = problem.data.keep.clone().unwrap();
        let mut weight: Vec<f32> = (0..keep.len()).map(|at| if keep[at] { problem.data.original[at] } else { 0.0 }).collect();
        refit(&problem, &mut weight, 8);
        let before = problem.loss(|at| weight[at]).unwrap().damped;
        let effort = Effort { exchange_turns: 4, exchange_steps: 4, ..Effort::LEAST };
        let mut new = keep.clone();
        super::refit(&problem, &mut weight, &mut new, &effort, (of_two.then_some(2), length)).unwrap();
        problem.data.keep = Some(new.clone());
        let after = problem.loss(|at| weight[at]).unwrap().damped;
        prop_assert!(not_above(after, before), "{} after {}", after, before);
        prop_assert!((0..new.len()).all(|at| new[at] || weight[at] == 0.0));
        let kept = |keep: &[bool]| keep.iter().filter(|keep| **keep).count();
        for (new, old) in new.chunks(length * d).zip(keep.chunks(length * d)) {
            prop_assert_eq!(kept(new), kept(old));
            prop_assert!(new.chunks(d).all(|row| row == &new[..d]), "a part of a vector was swapped");
            if of_two {
                let pairs = new[..d].chunks_exact(2).zip(old[..d].chunks_exact(2));
                prop_assert!(pairs.into_iter().all(|(new, old)| kept(new) == kept(old)));
            }
        }
    }
}

#[test]
fn a_sweep_beats_the_nearest_vectors() {
    for seed in 0..10 {
        let factors = factors(2, 60, seed, Order::Natural);
        let problem = problem(&factors, 8, 60, 2, seed);
        let mut sorted = sorted(&problem, 4, 2, 4, seed);
        for at in 0..sorted.indices.len() {
            let (row, column) = (at / 60 * 2, at % 60);
            let Palette::Pairs(table) = sorted.of_row(row) else { panic!("a palette of other vectors") };
            let original = |row: usize| problem.data.original[row * 60 + column];
            sorted.indices[at] = Entries::nearest(table, [original(row), original(row + 1)]);
        }
        let before = loss(&problem, &sorted);
        sweep::sweep(&problem, &problem.data.original, &mut sorted).unwrap();
        assert!(loss(&problem, &sorted) < before, "seed {seed}");
    }
}

#[test]
fn many_steps_of_palette_refit_are_the_least_squares_solution() {
    let (d, rows, length) = (30, 8, 2);
    let factors = factors(1, d as i64, 6, Order::Natural);
    let problem = problem(&factors, rows, d, length, 7);
    let mut sorted = sorted(&problem, 2, length, rows, 6);
    let h = whole(&factors);
    // One column for each value of the palette.
    let count = sorted.palette_length();
    let mut matrix = Tensor::zeros([count as i64; 2], (Kind::Double, Device::Cpu));
    let mut right = Tensor::zeros([count as i64, 1], (Kind::Double, Device::Cpu));
    for row in 0..rows {
        let mut ones = vec![0.0_f64; count * d];
        for column in (0..d).filter(|column| problem.data.kept(row * d + column)) {
            let index = usize::from(sorted.indices[row / length * d + column]);
            ones[(index * length + row % length) * d + column] = 1.0;
        }
        let ones = Tensor::from_slice(&ones).reshape([count as i64, d as i64]);
        let original = Tensor::from_slice(&problem.data.original[row * d..(row + 1) * d]).to_kind(Kind::Double).unsqueeze(1);
        matrix += ones.matmul(&h).matmul(&ones.tr());
        right += ones.matmul(&h).matmul(&original);
    }
    let exact: Vec<f64> = Vec::try_from(Tensor::linalg_solve(&matrix, &right, true).squeeze_dim(1)).unwrap();
    refit_palettes(&problem, &mut sorted, 60);
    for (ours, exact) in sorted.values().iter().zip(&exact) {
        assert!((f64::from(*ours) - exact).abs() < 2e-3 * (1.0 + exact.abs()), "{ours} and {exact}");
    }
}

/// The whole solver: its parts agree with each other, and it beats the sequential solution.
#[test]
fn vectors_are_solved_jointly() {
    let (rows, d) = (16, 48);
    let mut hessian = Hessian::new(d, Device::Cpu).unwrap();
    hessian.add(&normal([200, d / 3], 1).matmul(&normal([d / 3, d], 2))).unwrap();
    let weight = normal([rows, d], 3);
    for (length, group_size, sparsity) in [
        (2, 8, None),
        (4, 16, None),
        (2, 16, Some(Sparsity::Unstructured(0.4))),
        (4, 8, Some(Sparsity::NOfM(NmRatio { n: 2, m: 4 }))),
    ] {
        let grouping = Grouping::PerGroupedChannel { group_size };
        let palette = PaletteOptions { bits: BitWidth::Four, grouping, vector_length: length, ..PaletteOptions::default() };
        let prune = sparsity.map(|sparsity| PruneOptions { sparsity, rows_together: length, ..PruneOptions::default() });
        let options = JointOptions::new(prune, Some(palette));
        let factors = JointFactors::new(&hessian, options.dampening(), options.order()).unwrap();
        let solved = joint("a", &weight, &hessian, &factors, &LayerEvidence::default(), &options).unwrap();
        let palettized = solved.palettized.as_ref().unwrap();
        assert_eq!(palettized.indices.len(), (rows * d) as usize / length);
        assert_eq!(palettized.decode(solved.mask.as_deref()).unwrap(), solved.weight);
        assert!(solved.loss < solved.sequential_loss, "{} and {}", solved.loss, solved.sequential_loss);
        if let Some(mask) = &solved.mask {
            let row = d as usize;
            assert!(mask.chunks(length * row).all(|rows| rows.chunks(row).all(|row| row == &rows[..row.len()])));
            assert!(mask.contains(&false) && mask.contains(&true));
        }
    }
}

#[test]
fn vectors_that_do_not_fit_are_refused() {
    let hessian = {
        let mut hessian = Hessian::new(8, Device::Cpu).unwrap();
        hessian.add(&normal([40, 8], 1)).unwrap();
        hessian
    };
    let refused = |rows: i64, palette: PaletteOptions| {
        let options = JointOptions::new(None, Some(palette));
        let factors = JointFactors::new(&hessian, options.dampening(), options.order()).unwrap();
        joint("a", &normal([rows, 8], 2), &hessian, &factors, &LayerEvidence::default(), &options).unwrap_err().to_string()
    };
    let pairs = PaletteOptions { vector_length: 2, ..PaletteOptions::default() };
    assert!(refused(7, pairs).contains("vectors of 2 do not divide 7 output channels"));
    assert!(refused(6, PaletteOptions { vector_length: 3, ..pairs }).contains("1, 2 or 4"));
    assert!(refused(6, PaletteOptions { vector_length: 0, ..pairs }).contains("vectors of 0"));
    assert!(refused(6, PaletteOptions { per_channel_scale: true, ..pairs }).contains("no scales"));
    let grouping = Grouping::PerGroupedChannel { group_size: 4 };
    assert!(refused(8, PaletteOptions { axis: 1, grouping, ..pairs }).contains("input channels"));
    let grouping = Grouping::PerGroupedChannel { group_size: 3 };
    assert!(refused(6, PaletteOptions { grouping, ..pairs }).contains("groups of 3"));
}
