//! The tensor form of the solver, run on the CPU, against the solver for CPUs.

use squeeze_codebook::{BitWidth, Grouping, PaletteOptions, PruneOptions};
use squeeze_numerics::random::noise;

use super::*;
use crate::joint::joint;
use crate::{InputGeometry, OutputResidual};

/// A layer [o, d] of correlated inputs, with its evidence.
struct Layer {
    weight: Tensor,
    hessian: Hessian,
    residual: OutputResidual,
    held_out: Tensor,
}

fn normal(size: [i64; 2], seed: u64) -> Tensor {
    noise(&size, seed, Kind::Float).unwrap()
}

fn layer(o: i64, d: i64) -> Layer {
    let directions = normal([d / 3 + 1, d], 1);
    let inputs = |n: i64, seed| normal([n, d / 3 + 1], seed).matmul(&directions) + 0.3 * normal([n, d], seed + 1);
    let vectors = inputs(3 * d, 2);
    let mut hessian = Hessian::new(d, Device::Cpu).unwrap();
    hessian.add(&vectors).unwrap();
    let mut residual = OutputResidual::for_weight(InputGeometry::Linear, &[o, d], Device::Cpu).unwrap();
    residual.add(&vectors, &(0.05 * normal([3 * d, o], 4))).unwrap();
    Layer { weight: normal([o, d], 5), hessian, residual, held_out: inputs(50, 6) }
}

fn palettes(bits: BitWidth, group_size: usize) -> PaletteOptions {
    PaletteOptions { bits, grouping: Grouping::PerGroupedChannel { group_size }, ..PaletteOptions::default() }
}

fn pruning(sparsity: Sparsity) -> PruneOptions {
    PruneOptions { sparsity, ..PruneOptions::default() }
}

#[test]
fn the_tensor_form_finds_what_the_solver_for_cpus_finds() {
    let Layer { weight, hessian, residual, held_out } = layer(32, 300);
    let two_of_four = Sparsity::NOfM(NmRatio { n: 2, m: 4 });
    let settings = [
        (Some(Sparsity::Unstructured(0.4)), Some(palettes(BitWidth::Four, 16))),
        (Some(two_of_four), Some(palettes(BitWidth::Three, 8))),
        (None, Some(palettes(BitWidth::Four, 4))),
        (None, Some(palettes(BitWidth::Six, 32))),
        (Some(Sparsity::Unstructured(0.5)), None),
        (Some(Sparsity::Unstructured(0.0)), Some(palettes(BitWidth::Two, 16))),
    ];
    for (sparsity, palettize) in settings {
        let options = JointOptions::new(sparsity.map(pruning), palettize);
        assert!(takes(&hessian, &options) && !serves(&hessian, &options));
        let factors = JointFactors::new(&hessian, options.dampening(), options.order()).unwrap();
        for with_evidence in [false, true] {
            let evidence = match with_evidence {
                true => LayerEvidence { residual: Some(&residual), held_out: Some(&held_out), metric: None },
                false => LayerEvidence::default(),
            };
            let theirs = joint("a", &weight, &hessian, &factors, &evidence, &options).unwrap();
            let ours = solve("a", (weight.shallow_clone(), &weight.size()), &hessian, &factors, &evidence, &options);
            let ours = ours.unwrap().into_joint().unwrap();
            let what = format!("{sparsity:?}, {palettize:?}, evidence {with_evidence}");
            let near = |a: f64, b: f64| (a / b - 1.0).abs() < 0.01;
            assert!(
                near(ours.sequential_loss, theirs.sequential_loss),
                "{what}: {} {}",
                ours.sequential_loss,
                theirs.sequential_loss
            );
            assert!(near(ours.loss, theirs.loss), "{what}: {} and {}", ours.loss, theirs.loss);
            assert!(ours.loss < ours.sequential_loss, "{what}");
            match (ours.pruned_loss, theirs.pruned_loss) {
                (Some(a), Some(b)) => assert!(near(a, b) || (a < 1e-9 && b < 1e-9), "{what}: {a} and {b}"),
                (a, b) => assert_eq!(a, b, "{what}"),
            }
            assert_eq!(ours.notes, theirs.notes, "{what}");
            assert_eq!(ours.target.is_some(), theirs.target.is_some());
            check_mask(&ours, &theirs, sparsity == Some(two_of_four));
            match (&ours.palettized, palettize) {
                (Some(palettized), Some(_)) => {
                    assert_eq!(palettized.decode(ours.mask.as_deref()).unwrap(), ours.weight, "{what}");
                    assert_eq!(palettized.kept, theirs.palettized.unwrap().kept);
                }
                (palettized, options) => assert!(palettized.is_none() && options.is_none()),
            }
        }
    }
}

/// Masks of one size, in each group of four for 2:4, with exact zeros where pruned.
fn check_mask(ours: &Joint, theirs: &Joint, two_of_four: bool) {
    assert_eq!(ours.mask.is_some(), theirs.mask.is_some());
    let (Some(mask), Some(other)) = (&ours.mask, &theirs.mask) else { return };
    let kept = |mask: &[bool]| mask.iter().filter(|kept| **kept).count();
    assert_eq!(kept(mask), kept(other));
    assert!(mask.iter().zip(&ours.weight).all(|(kept, value)| *kept || value.to_bits() == 0));
    assert!(!two_of_four || mask.chunks(4).all(|four| kept(four) == 2));
}

#[test]
fn weights_that_their_palettes_hold_stay_as_they_are() {
    let Layer { hessian, residual, .. } = layer(8, 60);
    let weight = normal([8, 60], 9).sign();
    let options = JointOptions::new(None, Some(palettes(BitWidth::One, 8)));
    let factors = JointFactors::new(&hessian, options.dampening(), options.order()).unwrap();
    let evidence = LayerEvidence { residual: Some(&residual), held_out: None, metric: None };
    let solved = solve("a", (weight.shallow_clone(), &[8, 60]), &hessian, &factors, &evidence, &options);
    let solved = solved.unwrap().into_joint().unwrap();
    let theirs = joint("a", &weight, &hessian, &factors, &evidence, &options).unwrap();
    assert_eq!(solved.weight, theirs.weight);
    let other = JointOptions { effort: squeeze_codebook::Effort { palette_steps: 1, ..options.effort }, ..options };
    assert!(!takes(&hessian, &other));
}
