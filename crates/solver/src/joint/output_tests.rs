//! The polish by the metric of the outputs.

use half::f16;
use proptest::prelude::*;
use squeeze_codebook::{BitWidth, Codebook, Grouping, PaletteOptions};
use tch::Kind;

use super::factors::Order;
use super::output_polish::{self, polish_outputs};
use super::problem::{Data, Problem};
use super::sorted_codebook::SortedCodebook;
use super::tests::{factors, normal, not_above, uniform};
use super::*;
use crate::{OutputGradients, OutputMetric};

/// A metric of `rows` outputs whose errors have strongly correlated effects.
fn metric(rows: usize, seed: u64) -> OutputMetric {
    let rows = rows as i64;
    let few = normal([rows, 3], seed + 700).matmul(&normal([3, rows], seed + 800)) + 0.3 * normal([rows, rows], seed + 900);
    let mut gradients = OutputGradients::new(rows, Device::Cpu).unwrap();
    gradients.add(&few).unwrap();
    gradients.metric().unwrap().unwrap()
}

fn problem(factors: &JointFactors, rows: usize, columns: usize, length: usize, seed: u64) -> Problem<'_> {
    let original = to_vec(&normal([rows as i64, columns as i64], seed + 300)).unwrap();
    let random = uniform(rows / length * columns, seed + 400);
    let keep = random.chunks(columns).flat_map(|row| row.repeat(length)).map(|random| random >= 0.4).collect();
    let keep = if seed.is_multiple_of(2) { None } else { Some(keep) };
    Problem { factors, data: Data { original, keep, columns, rows, shape: vec![rows, columns] } }
}

/// Random palettes of 2^bits vectors or sorted values, and random indices.
fn sorted(problem: &Problem<'_>, bits: u8, length: usize, group_rows: usize, seed: u64) -> SortedCodebook {
    let bits = BitWidth::try_from(bits).unwrap();
    let Data { rows, columns, .. } = problem.data;
    let palette = bits.entries() * length;
    let mut palettes = to_vec(&normal([(rows / group_rows * palette) as i64, 1], seed + 500)).unwrap();
    if length == 1 {
        palettes.chunks_mut(palette).for_each(|palette| palette.sort_by(f32::total_cmp));
    }
    let palettes = palettes.into_iter().map(f16::from_f32).collect();
    let random = uniform(rows / length * columns, seed + 600);
    let indices = random.iter().map(|random| (f64::from(*random) * bits.entries() as f64) as u8).collect();
    let codebook = Codebook { bits, axis: 0, group_size: group_rows, vector_length: length, palettes, scales: None };
    SortedCodebook::new(&codebook, indices)
}

fn loss(problem: &Problem<'_>, sorted: &SortedCodebook, metric: &OutputMetric) -> f64 {
    let data = &problem.data;
    let value = |at| if data.kept(at) { sorted.value(at, data.columns) } else { 0.0 };
    output_polish::loss(problem, metric, value).unwrap()
}

/// Vectors, vector length, columns, bits, seed.
fn shapes() -> impl Strategy<Value = (usize, usize, usize, u8, u64)> {
    (1..40_usize, prop::sample::select(&[1_usize, 2, 4][..]), 2..140_usize, 1..4_u8, 0..1000_u64)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn no_round_raises_the_objective((vectors, length, d, bits, seed) in shapes(), whole in any::<bool>()) {
        let factors = factors(1, d as i64, seed, Order::Natural);
        let rows = vectors * length;
        let problem = problem(&factors, rows, d, length, seed);
        let metric = metric(rows, seed);
        let mut sorted = sorted(&problem, bits, length, if whole { rows } else { length }, seed);
        let mut before = loss(&problem, &sorted, &metric);
        for _ in 0..3 {
            let changed = polish_outputs(&problem, &mut sorted, &metric).unwrap();
            let after = loss(&problem, &sorted, &metric);
            prop_assert!(not_above(after, before), "{} after {}", after, before);
            prop_assert!(changed.is_multiple_of(length) && (changed == 0 || after < before));
            before = after;
        }
    }

    #[test]
    fn where_it_ends_no_other_entry_is_better((vectors, length, d, bits, seed) in (1..20_usize, 0..3_u32, 2..30_usize, 1..4_u8, 0..1000_u64).prop_map(|(vectors, power, d, bits, seed)| (vectors, 1_usize << power, d, bits, seed))) {
        let factors = factors(1, d as i64, seed, Order::Natural);
        let rows = vectors * length;
        let problem = problem(&factors, rows, d, length, seed);
        let metric = metric(rows, seed);
        let mut sorted = sorted(&problem, bits, length, length, seed);
        let mut turns = 0;
        while polish_outputs(&problem, &mut sorted, &metric).unwrap() > 0 {
            turns += 1;
            prop_assert!(turns < 300);
        }
        let least = loss(&problem, &sorted, &metric);
        for at in (0..sorted.indices.len()).filter(|at| problem.data.kept(at / d * length * d + at % d)).step_by(11) {
            let old = sorted.indices[at];
            for other in 0..sorted.entries as u8 {
                sorted.indices[at] = other;
                prop_assert!(loss(&problem, &sorted, &metric) >= least * (1.0 - 1e-4));
            }
            sorted.indices[at] = old;
        }
    }
}

#[test]
fn the_same_indices_on_any_number_of_threads() {
    let factors = factors(1, 150, 2, Order::Natural);
    let problem = problem(&factors, 700, 150, 2, 2);
    let metric = metric(700, 2);
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        // Tensors stay on this thread.
        let mut sorted = sorted(&problem, 3, 2, 100, 2);
        pool.in_place_scope(|_| polish_outputs(&problem, &mut sorted, &metric).unwrap());
        sorted.indices
    };
    assert!(on(1) == on(3));
}

/// The error that counts is lower, and the plain one higher.
#[test]
fn a_layer_is_solved_for_the_outputs_that_count() {
    let (o, d) = (96, 64);
    let mut hessian = Hessian::for_weight(crate::InputGeometry::Linear, &[o, d], Device::Cpu).unwrap();
    hessian.add(&normal([300, 20], 1).matmul(&normal([20, d], 2)).g_add(&(0.2 * normal([300, d], 3)))).unwrap();
    let weight = normal([o, d], 4);
    for vector_length in [1, 2] {
        let palette =
            PaletteOptions { bits: BitWidth::Four, grouping: Grouping::PerTensor, vector_length, ..PaletteOptions::default() };
        let options = JointOptions::new(None, Some(palette));
        let factors = JointFactors::new(&hessian, options.dampening(), options.order()).unwrap();
        let metric = metric(o as usize, 5);
        let solve = |metric: Option<&OutputMetric>| {
            let evidence = LayerEvidence { metric, ..LayerEvidence::default() };
            joint("layer", &weight, &hessian, &factors, &evidence, &options).unwrap()
        };
        let (plain, by_metric) = (solve(None), solve(Some(&metric)));
        let cost = |solved: &Joint| {
            let new: Vec<f32> = solved.weight.iter().map(|value| value.to_f32()).collect();
            let change = Tensor::from_slice(&new).view([o, d]) - &weight;
            let inputs = normal([300, 20], 1).matmul(&normal([20, d], 2)).g_add(&(0.2 * normal([300, d], 3)));
            let error = change.matmul(&inputs.tr());
            metric.times(&(0..o as usize), &error).unwrap().g_mul(&error).sum(Kind::Double).double_value(&[])
        };
        assert!(cost(&by_metric) < 0.8 * cost(&plain), "{} {}", cost(&by_metric), cost(&plain));
        assert!(by_metric.loss > plain.loss);
        let probes = Effort { output_probes: 8, ..options.effort };
        let asked = JointOptions { effort: probes, ..options };
        let of = |metric| {
            let evidence = LayerEvidence { metric, ..LayerEvidence::default() };
            joint("layer", &weight, &hessian, &factors, &evidence, &asked).unwrap().notes
        };
        assert!(of(None).contains(&Note::NoMetric) && !of(Some(&metric)).contains(&Note::NoMetric));
        assert!(!plain.notes.contains(&Note::NoMetric));
    }
    // A metric of another layer is refused.
    let options = JointOptions::new(None, Some(PaletteOptions::default()));
    let factors = JointFactors::new(&hessian, options.dampening(), options.order()).unwrap();
    let other = metric(32, 5);
    let evidence = LayerEvidence { metric: Some(&other), ..LayerEvidence::default() };
    assert!(matches!(joint("layer", &weight, &hessian, &factors, &evidence, &options), Err(Error::State(_))));
}
