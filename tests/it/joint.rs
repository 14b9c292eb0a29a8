//! The joint solver, compared with exhaustive search and with the sequential solver, and tested
//! with difficult inputs.

use half::f16;
use sdxl_squeeze::Error;
use sdxl_squeeze::codebook::{BitWidth, Effort, Grouping, NmRatio, PaletteOptions, PruneOptions, Sparsity};
use sdxl_squeeze::container::CompressedWeight;
use sdxl_squeeze::solver::palette::palettize;
use sdxl_squeeze::solver::{
    Hessian, Joint, JointFactors, JointOptions, LayerEvidence, Note, Order, OutputResidual, joint, output_energy, prune,
    prune as prune_alone,
};
use sdxl_squeeze::solver::{InputGeometry, Windows};
use tch::{Device, Kind, Tensor};

use crate::matrices::{correlated, hessian, numbers};

fn palette(bits: u8, group_size: Option<usize>) -> PaletteOptions {
    let grouping = group_size.map_or(Grouping::PerTensor, |group_size| Grouping::PerGroupedChannel { group_size });
    PaletteOptions { bits: BitWidth::try_from(bits).unwrap(), grouping, ..PaletteOptions::default() }
}

fn pruned(sparsity: Sparsity) -> Option<PruneOptions> {
    Some(PruneOptions { sparsity, ..PruneOptions::default() })
}

fn solve(weight: &Tensor, hessian: &Hessian, options: &JointOptions) -> Joint {
    let factors = JointFactors::new(hessian, options.dampening(), options.order()).unwrap();
    joint("a", weight, hessian, &factors, &LayerEvidence::default(), options).unwrap()
}

fn tensor(values: &[f16], like: &Tensor) -> Tensor {
    Tensor::from_slice(values).to_kind(Kind::Float).reshape(like.size())
}

fn cost(values: &[f16], weight: &Tensor, hessian: &Hessian) -> f64 {
    output_energy(&(tensor(values, weight) - weight), hessian).unwrap()
}

/// Asserts that the stored weight decodes to the solved one, that pruned elements are +0, and that
/// the reported loss is the actual one.
fn consistent(found: &Joint, weight: &Tensor, hessian: &Hessian) {
    let Some(palettized) = &found.palettized else { panic!("no palettes") };
    let codebook = palettized.codebook.clone();
    let stored = CompressedWeight::palettized(weight.size(), found.mask.as_deref(), codebook, &palettized.indices);
    assert_eq!(stored.unwrap().decode().unwrap(), found.weight);
    if let Some(mask) = &found.mask {
        assert!(found.weight.iter().zip(mask).all(|(value, keep)| *keep || value.to_bits() == 0), "pruned weights are +0");
    }
    assert!(palettized.codebook.palettes.chunks(palettized.codebook.bits.entries()).all(|palette| palette.is_sorted()));
    let cost = cost(&found.weight, weight, hessian);
    assert!((cost - found.loss).abs() <= 1e-3 * cost.max(1e-9), "{cost} is not {}", found.loss);
    assert!(found.loss <= found.sequential_loss);
}

#[test]
fn far_better_than_one_after_the_other_also_on_inputs_it_has_not_seen() {
    let cases = [
        (pruned(Sparsity::Unstructured(0.4)), palette(4, Some(16)), 0.7),
        (pruned(Sparsity::Unstructured(0.5)), palette(4, Some(16)), 0.75),
        (pruned(Sparsity::NOfM(NmRatio { n: 2, m: 4 })), palette(4, Some(8)), 0.85),
        (None, palette(4, Some(16)), 0.5),
        (None, palette(3, Some(16)), 0.5),
        (None, palette(2, None), 0.6),
    ];
    for (prune, palette, bound) in cases {
        let (mut ours, mut theirs) = (0.0, 0.0);
        for seed in 0..3 {
            let (weight, inputs) = (numbers(&[48, 192], seed), correlated(2000, 192, 70 + seed, 10 + seed));
            let seen = hessian(&inputs);
            let unseen = hessian(&correlated(2000, 192, 70 + seed, 40 + seed));
            let options = JointOptions::new(prune, Some(palette));
            let found = solve(&weight, &seen, &options);
            consistent(&found, &weight, &seen);
            ours += cost(&found.weight, &weight, &unseen);
            // With the least effort the joint solver is the sequential one, except for the weights
            // that elements have in the palettes.
            let factors = JointFactors::new(&seen, options.dampening(), options.order()).unwrap();
            let plain = JointOptions { effort: Effort::LEAST, ..options };
            theirs +=
                cost(&joint("a", &weight, &seen, &factors, &LayerEvidence::default(), &plain).unwrap().weight, &weight, &unseen);
        }
        assert!(ours < bound * theirs, "{prune:?} {palette:?}: {:.3}", ours / theirs);
    }
}

#[test]
fn near_the_best_of_all_on_layers_small_enough_to_try_everything() {
    let (d, trials) = (6, 40);
    let (mut best_ones, mut ratios) = (0, 0.0);
    for seed in 0..trials {
        let weight = numbers(&[2, d], seed);
        let seen = hessian(&correlated(60, d, seed + 7, seed + 500));
        // The effort is higher than the default, because the test asks how close the solver gets to
        // the optimum.
        let options = JointOptions::new(None, Some(palette(1, None)));
        let effort = Effort { palette_steps: 4, turns: 4, ..options.effort };
        let found = solve(&weight, &seen, &JointOptions { effort, ..options });
        consistent(&found, &weight, &seen);
        let h = seen.matrix().unwrap().squeeze_dim(0).to_kind(Kind::Double);
        let w = weight.to_kind(Kind::Double);
        let energy = |change: &Tensor| change.matmul(&h).dot_all(change);
        // The loop tries all assignments of two values to the twelve elements, with the best two
        // values for each assignment.
        let mut least = f64::INFINITY;
        for way in 0_u32..1 << (2 * d) {
            let ones: Vec<f64> = (0..2 * d).map(|at| f64::from(way >> at & 1)).collect();
            let ones = Tensor::from_slice(&ones).reshape([2, d]);
            let others = 1.0 - &ones;
            let (oo, ox, xx) = (energy(&ones), ones.matmul(&h).dot_all(&others), energy(&others));
            let (ow, xw) = (ones.matmul(&h).dot_all(&w), others.matmul(&h).dot_all(&w));
            let det = oo * xx - ox * ox;
            let (a, b) = if det > 1e-9 {
                ((ow * xx - xw * ox) / det, (xw * oo - ow * ox) / det)
            } else {
                (ow / oo.max(1e-12), xw / xx.max(1e-12))
            };
            least = least.min(energy(&(a * &ones + b * &others - &w)));
        }
        let ratio = found.loss / least;
        assert!(ratio > 0.999, "better than the best of all: {ratio}");
        assert!(ratio < 6.0, "{ratio}");
        best_ones += usize::from(ratio < 1.02);
        ratios += ratio / trials as f64;
    }
    assert!(best_ones * 4 >= trials as usize, "only {best_ones} of {trials} are the best of all");
    assert!(ratios < 1.4, "{ratios:.3} times the least loss in the mean");
}

trait DotAll {
    fn dot_all(&self, other: &Tensor) -> f64;
}

impl DotAll for Tensor {
    fn dot_all(&self, other: &Tensor) -> f64 {
        (self * other).sum(Kind::Double).double_value(&[])
    }
}

#[test]
fn every_width_every_group_and_grouped_convolutions() {
    let geometry = Windows { stride: [1; 2], padding: [1; 2], dilation: [1; 2], groups: 2 };
    let (weight, input) = (numbers(&[16, 4, 3, 3], 1), numbers(&[3, 8, 12, 12], 2));
    let mut seen = Hessian::for_weight(InputGeometry::Windows(geometry), &weight.size(), Device::Cpu).unwrap();
    seen.add(&input).unwrap();
    for bits in [1, 2, 3, 4, 6, 8] {
        for group in [None, Some(1), Some(4), Some(16)] {
            for prune in [None, pruned(Sparsity::Unstructured(0.4)), pruned(Sparsity::NOfM(NmRatio { n: 2, m: 4 }))] {
                let found = solve(&weight, &seen, &JointOptions::new(prune, Some(palette(bits, group))));
                consistent(&found, &weight, &seen);
                let zeros = found.mask.map_or(0, |mask| mask.iter().filter(|keep| !**keep).count());
                let share = if prune.is_some() { 0.395..0.52 } else { 0.0..0.001 };
                assert!(share.contains(&(zeros as f64 / 576.0)), "{bits} {group:?} {prune:?}: {zeros}");
            }
        }
    }
}

#[test]
fn a_convolution_of_stride_one_is_a_linear_on_its_windows() {
    let geometry = Windows { stride: [1; 2], padding: [1; 2], dilation: [1; 2], groups: 1 };
    let (weight, input) = (numbers(&[16, 60, 3, 3], 3), numbers(&[2, 60, 20, 20], 4));
    let mut conv = Hessian::for_weight(InputGeometry::Windows(geometry), &weight.size(), Device::Cpu).unwrap();
    conv.add(&input).unwrap();
    let options = JointOptions::new(pruned(Sparsity::Unstructured(0.4)), Some(palette(3, Some(8))));
    let found = solve(&weight, &conv, &options);
    consistent(&found, &weight, &conv);
    let windows = input.im2col([3, 3], [1, 1], [1, 1], [1, 1]).transpose(1, 2).contiguous();
    let linear = solve(&weight.reshape([16, 540]), &hessian(&windows), &options);
    assert!((found.loss / linear.loss - 1.0).abs() < 0.05, "{} and {}", found.loss, linear.loss);
}

#[test]
fn only_pruned_it_is_refitted() {
    let (weight, seen) = (numbers(&[32, 100], 5), hessian(&correlated(20_000, 100, 6, 7)));
    let options = JointOptions::new(pruned(Sparsity::Unstructured(0.5)), None);
    let found = solve(&weight, &seen, &options);
    let before = prune(&weight, &seen, &options.prune.unwrap()).unwrap();
    assert!(found.palettized.is_none());
    assert!(found.loss < 0.8 * before.loss, "{} and {}", found.loss, before.loss);
    // Without exchanges the mask is SparseGPT's. With exchanges the mask keeps as many elements in
    // each row, and the loss is lower.
    let same = JointOptions { effort: Effort { exchange_turns: 0, ..options.effort }, ..options };
    let same = solve(&weight, &seen, &same);
    let mask = Vec::<bool>::try_from(before.mask.flatten(0, -1)).unwrap();
    assert!(same.mask.as_ref() == Some(&mask) && same.loss < 0.95 * before.loss && found.loss < 0.95 * same.loss);
    let kept = |mask: &[bool]| mask.chunks(100).map(|row| row.iter().filter(|kept| **kept).count()).collect::<Vec<_>>();
    assert_eq!(kept(found.mask.as_ref().unwrap()), kept(&mask));
    assert!((found.pruned_loss.unwrap() / found.loss - 1.0).abs() < 0.01, "fp16 costs little");
}

#[test]
fn the_same_bytes_on_any_number_of_threads() {
    let run = |prune| {
        let (weight, seen) = (numbers(&[48, 333], 8), hessian(&correlated(800, 333, 9, 10)));
        let found = solve(&weight, &seen, &JointOptions::new(prune, Some(palette(4, Some(16)))));
        let palettized = found.palettized.unwrap();
        (found.weight, palettized.codebook.palettes, palettized.indices, found.mask, found.loss.to_bits())
    };
    for prune in [None, pruned(Sparsity::Unstructured(0.4))] {
        let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let expected = pool(1).install(|| run(prune));
        assert!(pool(3).install(|| run(prune)) == expected);
        let threads = tch::get_num_threads();
        for count in [1, 2] {
            tch::set_num_threads(count);
            assert!(run(prune) == expected, "{count} threads of libtorch");
        }
        tch::set_num_threads(threads);
    }
}

#[test]
fn few_vectors_mean_more_dampening_and_a_note() {
    let weight = numbers(&[32, 256], 11);
    for vectors in [1, 8, 40] {
        let seen = hessian(&correlated(vectors, 256, 12, 13));
        let unseen = hessian(&correlated(3000, 256, 12, 14));
        for prune in [None, pruned(Sparsity::Unstructured(0.4))] {
            let options = JointOptions::new(prune, Some(palette(4, Some(16))));
            let found = solve(&weight, &seen, &options);
            assert!(found.notes.iter().any(|note| matches!(note, Note::FewVectors { dimension: 256, .. })), "{:?}", found.notes);
            let shrunk = |note: &Note| matches!(note, Note::Shrunk { used, .. } if *used > options.dampening());
            assert!(found.notes.iter().any(shrunk), "{vectors}: {:?}", found.notes);
            let factors = JointFactors::new(&seen, options.dampening(), options.order()).unwrap();
            let plain = JointOptions { effort: Effort::LEAST, ..options };
            let plain = joint("a", &weight, &seen, &factors, &LayerEvidence::default(), &plain).unwrap();
            let (ours, theirs) = (cost(&found.weight, &weight, &unseen), cost(&plain.weight, &weight, &unseen));
            assert!(ours < 1.1 * theirs, "{vectors} vectors, {prune:?}: {:.3}", ours / theirs);
        }
    }
}

#[test]
fn dead_columns_and_constant_weights() {
    let mut inputs = correlated(400, 64, 15, 16);
    let _ = inputs.narrow(1, 10, 5).zero_();
    let (weight, seen) = (numbers(&[16, 64], 17), hessian(&inputs));
    inputs = inputs.narrow(0, 0, 1);
    for prune in [None, pruned(Sparsity::Unstructured(0.4))] {
        let options = JointOptions::new(prune, Some(palette(3, Some(4))));
        consistent(&solve(&weight, &seen, &options), &weight, &seen);
        let (same, zero) = (weight.ones_like() * 0.5, weight.zeros_like());
        let found = solve(&zero, &seen, &options);
        assert!(found.loss == 0.0 && found.weight.iter().all(|value| value.to_bits() == 0));
        consistent(&solve(&same, &seen, &options), &same, &seen);
        consistent(&solve(&weight, &hessian(&inputs), &options), &weight, &hessian(&inputs));
    }
    let found = solve(&weight, &seen, &JointOptions::new(None, Some(palette(3, Some(4)))));
    let dead = tensor(&found.weight, &weight).narrow(1, 10, 5);
    let off = (dead - weight.narrow(1, 10, 5)).abs().max().double_value(&[]);
    assert!(off < 1.5, "not pruned, they stay near what they were: {off}");
}

/// One input, one output, equal rows, equal columns with equal inputs, and inputs that are all
/// zero.
#[test]
fn layers_with_little_in_them() {
    let (wide, inputs) = (numbers(&[16, 64], 31), correlated(200, 64, 33, 32));
    let equal = |tensor: &Tensor, dimension: i64| tensor.narrow(dimension, 0, 1).expand_as(tensor).contiguous();
    let cases = [
        ("one input", numbers(&[16, 1], 33), numbers(&[50, 1], 34)),
        ("one output", wide.narrow(0, 0, 1), inputs.shallow_clone()),
        ("equal rows", equal(&wide, 0), inputs.shallow_clone()),
        ("equal columns with equal inputs", equal(&wide, 1), equal(&inputs, 1)),
        ("no inputs but zeros", wide.shallow_clone(), inputs.zeros_like()),
        ("weights and inputs of zeros", wide.zeros_like(), inputs.zeros_like()),
    ];
    for (what, weight, inputs) in cases {
        let seen = hessian(&inputs);
        for prune in [None, pruned(Sparsity::Unstructured(0.5))] {
            let found = solve(&weight, &seen, &JointOptions::new(prune, Some(palette(2, None))));
            assert!(found.weight.iter().all(|value| value.is_finite()), "{what}");
            if output_energy(&weight, &seen).unwrap() > 0.0 {
                consistent(&found, &weight, &seen);
            } else {
                assert!(found.loss < 1e-6, "{what}: {}", found.loss);
            }
            // Few different numbers need no more entries than there are.
            if prune.is_none() && what.starts_with("equal columns") {
                let size = output_energy(&weight, &seen).unwrap();
                assert!(found.loss < 0.2 * size, "{what}: {} of {size}", found.loss);
            }
        }
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let (weight, seen) = (numbers(&[16, 64], 18), hessian(&correlated(200, 64, 19, 20)));
    let options = JointOptions::new(None, Some(palette(4, Some(16))));
    let factors = JointFactors::new(&seen, options.dampening(), Order::Activation).unwrap();
    let bad = |weight: &Tensor, factors: &JointFactors, options: &JointOptions| {
        joint("a", weight, &seen, factors, &LayerEvidence::default(), options).unwrap_err()
    };

    let mut with_nan = weight.copy();
    let _ = with_nan.get(3).get(3).fill_(f64::NAN);
    assert!(matches!(bad(&with_nan, &factors, &options), Error::NotFinite(_)));
    with_nan = weight.copy() * 1e30;
    assert!(matches!(bad(&with_nan, &factors, &options), Error::NotFinite(_)), "beyond fp16");
    assert!(matches!(bad(&numbers(&[16, 63], 1), &factors, &options), Error::Shape { .. }));
    let natural = JointFactors::new(&seen, options.dampening(), Order::Natural).unwrap();
    assert!(matches!(bad(&weight, &natural, &options), Error::State(_)));
    let other = JointFactors::new(&seen, 2.0 * options.dampening(), Order::Activation).unwrap();
    assert!(matches!(bad(&weight, &other, &options), Error::State(_)), "another dampening");
    let misfit = JointOptions::new(None, Some(palette(4, Some(7))));
    assert!(matches!(bad(&weight, &factors, &misfit), Error::Argument(_)));
    assert!(BitWidth::try_from(5).is_err());
    let empty = Hessian::new(64, Device::Cpu).unwrap();
    assert!(matches!(JointFactors::new(&empty, 0.01, Order::Natural), Err(Error::State(_))));
    assert!(matches!(JointFactors::new(&seen, -1.0, Order::Natural), Err(Error::Range { .. })));
    assert!(matches!(JointFactors::new(&seen, f64::NAN, Order::Natural), Err(Error::Range { .. })));
}

#[test]
fn palettes_that_it_cannot_solve_are_made_after_it_with_a_note() {
    let (weight, seen) = (numbers(&[16, 64], 21), hessian(&correlated(300, 64, 22, 23)));
    let inputs = PaletteOptions { axis: 1, ..palette(4, Some(8)) };
    let scaled = PaletteOptions { per_channel_scale: true, ..palette(4, Some(4)) };
    for palette in [inputs, scaled] {
        let found = solve(&weight, &seen, &JointOptions::new(pruned(Sparsity::Unstructured(0.4)), Some(palette)));
        assert!(found.notes.contains(&Note::NotJoint));
        consistent(&found, &weight, &seen);
    }
}

/// Groups of input channels are neighbours only in the weight's own order, and the solver works on
/// the columns in another one: for linear layers and convolutions, with and without pruning.
#[test]
fn palettes_along_input_channels_are_never_worse_than_the_sequential_ones() {
    for (shape, seed) in [([24_i64, 32, 1, 1], 51), ([24, 8, 3, 3], 61)] {
        let columns = shape[1..].iter().product();
        let (weight, seen) = (numbers(&shape, seed), hessian(&correlated(900, columns, seed + 1, seed + 2)));
        let weight = if columns == shape[1] { weight.view([24, -1]) } else { weight };
        for prune in [None, pruned(Sparsity::Unstructured(0.4))] {
            for scaled in [false, true] {
                let palette = PaletteOptions { axis: 1, per_channel_scale: scaled, ..palette(3, Some(4)) };
                let options = JointOptions::new(prune, Some(palette));
                let found = solve(&weight, &seen, &options);
                consistent(&found, &weight, &seen);
                assert!(found.notes.contains(&Note::NotJoint));
                // The sequential solver: SparseGPT, then the best palettes.
                let sizes: Vec<usize> = weight.size().iter().map(|size| *size as usize).collect();
                let (start, keep) = match &prune {
                    None => (weight.copy(), None),
                    Some(options) => {
                        let pruned = prune_alone(&weight, &seen, options).unwrap();
                        (pruned.weight.reshape(weight.size()), Some(Vec::<bool>::try_from(pruned.mask.flatten(0, -1)).unwrap()))
                    }
                };
                let half = Vec::<f16>::try_from(start.flatten(0, -1).to_kind(Kind::Half)).unwrap();
                let palettized = palettize("a", &half, &sizes, keep.as_deref(), &palette).unwrap();
                let theirs = cost(&palettized.decode(keep.as_deref()).unwrap(), &weight, &seen);
                assert!(found.loss <= 1.0001 * theirs, "{shape:?} {prune:?}: {} is worse than {theirs}", found.loss);
            }
        }
    }
}

#[test]
fn corrections_are_gradients_of_the_weight() {
    let cases = [
        (InputGeometry::Linear, vec![6, 5], vec![3, 7, 5]),
        (InputGeometry::Windows(Windows::new(1, 1)), vec![6, 4, 3, 3], vec![2, 4, 9, 8]),
        (
            InputGeometry::Windows(Windows { stride: [2, 1], padding: [1, 0], dilation: [1, 2], groups: 2 }),
            vec![6, 2, 3, 3],
            vec![2, 4, 9, 8],
        ),
    ];
    for (kind, shape, input) in cases {
        let (weight, x) = (numbers(&shape, 1).set_requires_grad(true), numbers(&input, 2));
        let output = match kind {
            InputGeometry::Linear => x.linear(&weight, None::<Tensor>),
            InputGeometry::Windows(Windows { stride, padding, dilation, groups }) => {
                x.conv2d(&weight, None::<Tensor>, stride, padding, dilation, groups)
            }
        };
        let lack = numbers(&output.size(), 3);
        (output * &lack).sum(Kind::Float).backward();
        let expected = weight.grad().reshape([shape[0], -1]) * (2.0 / input[0] as f64);
        let mut correction = OutputResidual::for_weight(kind, &shape, Device::Cpu).unwrap();
        let mut other = OutputResidual::for_weight(kind, &shape, Device::Cpu).unwrap();
        correction.add(&x.narrow(0, 0, 1), &lack.narrow(0, 0, 1)).unwrap();
        other.add(&x.narrow(0, 1, input[0] - 1), &lack.narrow(0, 1, input[0] - 1)).unwrap();
        correction.merge(other).unwrap();
        let off = (correction.matrix().unwrap() - &expected).norm() / expected.norm();
        assert!(off.double_value(&[]) < 1e-5, "{kind:?}: {off}");
        assert!(correction.add(&x, &(lack * f64::NAN)).is_err());
    }
}

#[test]
fn a_layer_makes_up_for_the_errors_before_it_as_far_as_it_can() {
    // The layer gets A x instead of x, so its best weight is W A^-1.
    let (weight, x) = (numbers(&[16, 24], 30), numbers(&[4000, 24], 31));
    let a: Tensor = Tensor::eye(24, (Kind::Float, Device::Cpu)) + 0.05 * numbers(&[24, 24], 32);
    let reaches = x.matmul(&a.tr());
    let seen = hessian(&reaches);
    let mut correction = OutputResidual::for_weight(InputGeometry::Linear, &[16, 24], Device::Cpu).unwrap();
    correction.add(&reaches, &(&x - &reaches).matmul(&weight.tr())).unwrap();
    let options = JointOptions::new(pruned(Sparsity::Unstructured(0.4)), Some(palette(4, Some(4))));
    for order in [Order::Natural, Order::Activation] {
        let options = match order {
            Order::Natural => options,
            Order::Activation => JointOptions { prune: None, ..options },
        };
        let factors = JointFactors::new(&seen, options.dampening(), order).unwrap();
        let beside = LayerEvidence { residual: Some(&correction), ..LayerEvidence::default() };
        let found = joint("a", &weight, &seen, &factors, &beside, &options).unwrap();
        let target = found.target.unwrap();
        let best = weight.matmul(&a.inverse());
        let distance = |other: &Tensor| ((other - &best).norm() / best.norm()).double_value(&[]);
        assert!(distance(&target) < 0.1 * distance(&weight), "{} and {}", distance(&target), distance(&weight));
        // The stored weight is closer to the dense outputs than the weight that is solved without
        // the residual.
        let without = joint("a", &weight, &seen, &factors, &LayerEvidence::default(), &options).unwrap();
        let error = |stored: &[f16]| {
            let outputs = reaches.matmul(&tensor(stored, &weight).tr()) - x.matmul(&weight.tr());
            outputs.square().sum(Kind::Double).double_value(&[])
        };
        assert!(error(&found.weight) < 0.9 * error(&without.weight), "{} {}", error(&found.weight), error(&without.weight));
    }
}

#[test]
fn a_weight_that_palettes_hold_exactly_ends_no_worse_at_its_output_than_exact() {
    let inputs = correlated(300, 24, 5, 1);
    let hessian = hessian(&inputs);
    for values in [&[0.05_f32][..], &[-0.0625, 0.07], &[-0.08, 0.01, 0.09]] {
        let elements: Vec<f32> = (0..16 * 24).map(|at| values[(at * 7919 + at / 24) % values.len()]).collect();
        let weight = Tensor::from_slice(&elements).reshape([16, 24]).to_kind(Kind::Half).to_kind(Kind::Float);
        let options = JointOptions::new(None, Some(palette(4, Some(4))));
        let factors = JointFactors::new(&hessian, options.dampening(), options.order()).unwrap();
        // Without a residual to make up for, the exact weight is the best one.
        let found = solve(&weight, &hessian, &options);
        assert_eq!(tensor(&found.weight, &weight), weight);
        assert!(found.loss == 0.0 && found.notes.is_empty(), "{:?}", found.notes);
        // With the residual of earlier errors another weight may be better, but none may be worse.
        // 16 values cannot make up for the smallest residuals.
        for size in [1e-9, 1e-6, 1e-3, 0.3] {
            let lack = numbers(&[300, 16], 9) * size;
            let mut correction = OutputResidual::for_weight(InputGeometry::Linear, &[16, 24], Device::Cpu).unwrap();
            correction.add(&inputs, &lack).unwrap();
            let beside = LayerEvidence { residual: Some(&correction), ..LayerEvidence::default() };
            let found = joint("layer", &weight, &hessian, &factors, &beside, &options).unwrap();
            let exact = Vec::<f16>::try_from(weight.to_kind(Kind::Half).flatten(0, -1)).unwrap();
            let target = found.target.as_ref().unwrap();
            let [ours, exact] = [&found.weight, &exact].map(|values| cost(values, target, &hessian));
            assert!(ours <= exact * (1.0 + 1e-6), "{values:?}, {size}: {ours:.3e}, exact {exact:.3e}");
        }
    }
}

#[test]
fn what_is_worse_on_held_out_samples_is_not_taken() {
    // A few directions dominate the calibration inputs. The held-out vectors `across` vary equally
    // in all directions.
    let weight = numbers(&[32, 96], 40);
    let seen = hessian(&correlated(3000, 96, 41, 42));
    let alike = correlated(300, 96, 41, 43);
    let across = numbers(&[300, 96], 44);
    let options = JointOptions::new(None, Some(palette(3, Some(16))));
    let factors = JointFactors::new(&seen, options.dampening(), options.order()).unwrap();
    let solve = |vectors: &Tensor| {
        let beside = LayerEvidence { held_out: Some(vectors), ..LayerEvidence::default() };
        joint("a", &weight, &seen, &factors, &beside, &options).unwrap()
    };
    assert!(solve(&alike).notes.is_empty(), "{:?}", solve(&alike).notes);
    let found = solve(&across);
    let Some(Note::HeldOutNoBetter { ratio }) = found.notes.last() else { panic!("{:?}", found.notes) };
    assert!(*ratio > 1.0);
    consistent(&found, &weight, &seen);
    assert!((found.loss / found.sequential_loss - 1.0).abs() < 1e-9);
}

#[test]
fn some_vectors_are_vectors() {
    let x = numbers(&[3, 50, 8], 1);
    let linear = Hessian::new(8, Device::Cpu).unwrap();
    let some = linear.some_vectors(&x, 40).unwrap();
    assert_eq!(some.size(), [38, 8]);
    assert_eq!(some.get(1), x.reshape([150, 8]).get(4));
    let geometry = Windows { stride: [2, 1], padding: [1; 2], dilation: [1, 2], groups: 2 };
    let conv = Hessian::for_weight(InputGeometry::Windows(geometry), &[4, 3, 3, 3], Device::Cpu).unwrap();
    let image = numbers(&[2, 6, 20, 20], 2);
    let some = conv.some_vectors(&image, 16).unwrap();
    assert_eq!(some.size(), [16, 54]);
    // The first channel of the first window has rows 5 to 7, and every other column from column 6
    // on.
    let first = image.get(0).get(0).narrow(0, 5, 3).slice(1, 6, 11, 2).reshape([9]);
    assert_eq!(some.get(0).narrow(0, 0, 9), first);
    assert_eq!(conv.some_vectors(&numbers(&[1, 6, 3, 3], 3), 16).unwrap().size()[1], 54);
}
