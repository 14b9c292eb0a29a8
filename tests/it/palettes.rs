//! Palettes, compared with those of coremltools, and tested for properties that hold for every
//! weight.

use std::collections::BTreeMap;

use half::f16;
use proptest::prelude::*;
use sdxl_squeeze::codebook::{BitWidth, Grouping, Misfit, OnMisfit, PaletteOptions};
use sdxl_squeeze::solver::palette::{Palettized, palettize, palettize_weighted};
use sdxl_squeeze::{Error, Result};
use tch::{Kind, Tensor};

use crate::support::{repo, tensors};

fn options(bits: u8, group: Option<(usize, usize)>) -> PaletteOptions {
    let (grouping, axis) = match group {
        None => (Grouping::PerTensor, 0),
        Some((group_size, axis)) => (Grouping::PerGroupedChannel { group_size }, axis),
    };
    PaletteOptions { bits: BitWidth::try_from(bits).unwrap(), grouping, axis, ..PaletteOptions::default() }
}

fn done(palettized: Result<Palettized>) -> Palettized {
    palettized.unwrap()
}

fn squared_error(a: &[f16], b: &[f16], keep: &[bool]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).zip(keep).filter(|(_, keep)| **keep).map(|((a, b), _)| (a.to_f64() - b.to_f64()).powi(2)).sum()
}

/// Seeded values with the distribution of typical weights.
fn random(count: usize, seed: u64) -> Vec<f16> {
    use rand::{RngExt, SeedableRng};
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| f16::from_f32(0.02 * random.sample::<f32, _>(rand_distr::StandardNormal))).collect()
}

// ----------------------------------------------------------------------------------------------
// coremltools

struct Golden(BTreeMap<String, Tensor>);

impl Golden {
    fn read() -> Self {
        Golden(tensors(&repo("tests/golden/palettes.safetensors")))
    }

    fn values(&self, key: &str) -> Vec<f16> {
        let flat = self.0.get(key).unwrap_or_else(|| panic!("no {key}")).reshape([-1]).to_kind(Kind::Float);
        Vec::<f32>::try_from(flat).unwrap().into_iter().map(f16::from_f32).collect()
    }

    fn shape(&self, key: &str) -> Vec<usize> {
        self.0[key].size().into_iter().map(|size| usize::try_from(size).unwrap()).collect()
    }

    /// The names of all golden palettes, each with its layer and options.
    fn cases(&self) -> Vec<(String, String, PaletteOptions)> {
        let cases = self.0.keys().filter_map(|key| key.strip_suffix("/lut"));
        let cases: Vec<_> = cases
            .map(|case| {
                let [layer, bits, kind] = case.split('/').collect::<Vec<_>>().try_into().unwrap();
                let group = kind.strip_prefix("gs").map(|kind| {
                    let [size, axis] = kind.split('.').take(2).collect::<Vec<_>>().try_into().unwrap();
                    (size.parse().unwrap(), axis.strip_prefix("axis").unwrap().parse().unwrap())
                });
                let per_channel_scale = kind.ends_with(".scaled");
                let bits = bits.strip_prefix('b').unwrap().parse().unwrap();
                (case.to_owned(), layer.to_owned(), PaletteOptions { per_channel_scale, ..options(bits, group) })
            })
            .collect();
        assert_eq!(cases.len(), 40);
        cases
    }
}

#[test]
fn palettes_equal_those_of_coremltools_where_nothing_is_pruned() {
    let golden = Golden::read();
    let (mut entries, mut off) = (0, 0);
    for (case, layer, options) in golden.cases().into_iter().filter(|(_, layer, _)| !layer.ends_with(".sparse")) {
        let (weight, shape) = (golden.values(&layer), golden.shape(&layer));
        let ours = done(palettize(&layer, &weight, &shape, None, &options));
        let theirs = golden.values(&format!("{case}/lut"));
        assert_eq!(ours.codebook.palettes.len(), theirs.len(), "{case}");
        assert_eq!(
            ours.codebook.scales,
            options.per_channel_scale.then(|| golden.values(&format!("{case}/scale")).into()),
            "{case}"
        );
        for (ours, theirs) in ours.codebook.palettes.iter().zip(&theirs) {
            // The last bit may differ where a mean is halfway between two fp16 values.
            let bits = i32::from(ours.to_bits()) - i32::from(theirs.to_bits());
            assert!(bits.abs() <= 1, "{case}: {ours}, not {theirs}");
            entries += 1;
            off += i32::from(bits != 0);
        }
        let keep = vec![true; weight.len()];
        let decoded = ours.decode(None).unwrap();
        let (our_error, their_error) =
            (squared_error(&decoded, &weight, &keep), squared_error(&golden.values(&format!("{case}/weight")), &weight, &keep));
        assert!((our_error - ours.squared_error).abs() <= 1e-9 * our_error, "{case}: {our_error}, not {}", ours.squared_error);
        assert!(our_error <= their_error * (1.0 + 1e-6), "{case}: {our_error:e}, theirs {their_error:e}");
    }
    assert!(off * 1000 <= entries, "{off} of {entries} palette entries differ, in their last bit");
}

#[test]
fn pruned_weights_cost_no_entry_and_stay_zero() {
    let golden = Golden::read();
    for (case, layer, options) in golden.cases().into_iter().filter(|(_, layer, _)| layer.ends_with(".sparse")) {
        let (weight, shape) = (golden.values(&layer), golden.shape(&layer));
        let keep: Vec<bool> = weight.iter().map(|value| *value != f16::ZERO).collect();
        let ours = done(palettize(&layer, &weight, &shape, Some(&keep), &options)).decode(Some(&keep)).unwrap();
        let theirs = golden.values(&format!("{case}/weight"));
        let ratio = squared_error(&ours, &weight, &keep) / squared_error(&theirs, &weight, &keep);
        assert!(ratio <= 0.9, "{case}: {ratio:.3} of coremltools' error on the kept elements");
        assert!(ours.iter().zip(&keep).all(|(value, keep)| *keep || value.to_bits() == 0));
    }
}

// ----------------------------------------------------------------------------------------------
// more bits and smaller groups

#[test]
fn more_bits_and_smaller_groups_are_never_worse() {
    let shape = [64, 32, 3, 2];
    let weight = random(shape.iter().product(), 1);
    let error = |bits, group| done(palettize("a", &weight, &shape, None, &options(bits, group))).squared_error;
    // More bits or smaller groups cannot increase the error of the optimum. Rounding the entries to
    // fp16 can add at most this much.
    let largest = weight.iter().map(|value| value.to_f64().abs()).fold(0.0, f64::max);
    let slack = weight.len() as f64 * (largest * 2_f64.powi(-11)).powi(2);
    for bits in [1, 2, 3, 4, 6, 8] {
        for axis in [0, 1] {
            let groups = [Some((4, axis)), Some((16, axis)), Some((32, axis)), None];
            let errors = groups.map(|group| error(bits, group));
            assert!(errors.windows(2).all(|pair| pair[0] <= pair[1] + slack), "{bits} bits: {errors:?}");
        }
    }
    for group in [None, Some((16, 0)), Some((16, 1))] {
        let errors = [8, 6, 4, 3, 2, 1].map(|bits| error(bits, group));
        assert!(errors.windows(2).all(|pair| pair[0] < pair[1]), "{errors:?}");
    }
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let shape = [48, 64, 3, 3];
    let weight = random(shape.iter().product(), 2);
    let keep: Vec<bool> = (0..weight.len()).map(|at| at % 5 > 1).collect();
    for options in [options(4, Some((16, 0))), options(3, Some((4, 1))), options(8, None)] {
        for options in [options, PaletteOptions { per_channel_scale: true, ..options }] {
            let with = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let ours = pool.install(|| done(palettize("a", &weight, &shape, Some(&keep), &options)));
                let decoded = pool.install(|| ours.decode(Some(&keep)).unwrap());
                (ours.squared_error.to_bits(), ours, decoded)
            };
            assert!(with(1) == with(3));
        }
    }
}

// ----------------------------------------------------------------------------------------------
// properties for every weight

/// A weight of shape [4, 6] or [4, 6, 1, 2] with few or many distinct values, a mask, and options
/// that fit the shape.
fn anything() -> impl Strategy<Value = (Vec<f16>, Vec<usize>, Vec<bool>, PaletteOptions)> {
    let shape = prop::sample::select(vec![vec![4, 6], vec![4, 6, 1, 2]]);
    let group = prop::sample::select(vec![None, Some((1, 0)), Some((2, 0)), Some((3, 1)), Some((2, 1)), Some((1, 1))]);
    let bits = prop::sample::select(vec![1_u8, 2, 3, 4, 6, 8]);
    (shape, group, bits, any::<bool>(), any::<bool>()).prop_flat_map(|(shape, group, bits, per_channel_scale, few)| {
        let count: usize = shape.iter().product();
        let value = (0_u16..if few { 3 } else { 0x7c00 }, any::<bool>())
            .prop_map(|(bits, negative)| f16::from_bits(bits | if negative { 0x8000 } else { 0 }));
        let options = PaletteOptions { per_channel_scale, ..options(bits, group) };
        (prop::collection::vec(value, count), Just(shape), prop::collection::vec(prop::bool::weighted(0.6), count), Just(options))
    })
}

/// The group of each element.
fn groups_of(shape: &[usize], axis: usize, group_size: usize) -> Vec<usize> {
    let inner: usize = shape[axis + 1..].iter().product();
    (0..shape.iter().product()).map(|at| at / inner % shape[axis] / group_size).collect()
}

proptest! {
    #[test]
    fn what_a_palette_promises((weight, shape, keep, options) in anything()) {
        let ours = done(palettize("a", &weight, &shape, Some(&keep), &options));
        let entries = options.bits.entries();
        let group_of = groups_of(&shape, ours.codebook.axis, ours.codebook.group_size);
        prop_assert_eq!(ours.codebook.groups(), group_of.iter().max().unwrap() + 1);
        prop_assert_eq!(ours.kept, keep.iter().filter(|keep| **keep).count());
        let decoded = ours.decode(Some(&keep)).unwrap();
        for (group, palette) in ours.codebook.palettes.chunks(entries).enumerate() {
            prop_assert!(palette.is_sorted() && palette.iter().all(|value| value.is_finite() && value.to_bits() != 0x8000));
            let kept: Vec<usize> = (0..weight.len()).filter(|&at| keep[at] && group_of[at] == group).collect();
            if kept.is_empty() {
                prop_assert!(palette.iter().all(|value| value.to_bits() == 0));
            }
            if !options.per_channel_scale {
                // Each element has the index of the nearest entry. Of two entries that are equally
                // near, it is the lower one, and of equal entries the first.
                for &at in &kept {
                    let distance = |entry: &f16| (entry.to_f64() - weight[at].to_f64()).abs();
                    let best = palette.iter().enumerate().min_by(|a, b| distance(a.1).total_cmp(&distance(b.1))).unwrap().0;
                    prop_assert_eq!(usize::from(ours.indices[at]), best);
                    prop_assert_eq!(decoded[at], palette[best]);
                }
                let mut values: Vec<f16> = kept.iter().map(|&at| weight[at]).collect();
                values.sort_by(|a, b| a.partial_cmp(b).unwrap());
                values.dedup();
                if values.len() <= entries {
                    prop_assert!(kept.iter().all(|&at| decoded[at] == weight[at]), "few values are kept without loss");
                }
            }
        }
        if let Some(scales) = &ours.codebook.scales {
            let row = weight.len() / shape[0];
            for (at, &index) in ours.indices.iter().enumerate().filter(|(at, _)| keep[*at]) {
                let entry = ours.codebook.palettes[group_of[at] * entries + usize::from(index)];
                prop_assert_eq!(decoded[at], f16::from_f32(entry.to_f32() * scales.values[at / row].to_f32()));
            }
        }
        for at in (0..weight.len()).filter(|&at| !keep[at]) {
            prop_assert_eq!((decoded[at].to_bits(), ours.indices[at]), (0, 0));
        }
        let error = squared_error(&decoded, &weight, &keep);
        prop_assert!((error - ours.squared_error).abs() <= 1e-12 * error);
    }

    #[test]
    fn what_is_pruned_has_no_influence((weight, shape, keep, options) in anything(), other in 0_u16..0x7c00) {
        let changed: Vec<f16> =
            weight.iter().zip(&keep).map(|(value, keep)| if *keep { *value } else { f16::from_bits(other) }).collect();
        prop_assert_eq!(
            done(palettize("a", &weight, &shape, Some(&keep), &options)),
            done(palettize("a", &changed, &shape, Some(&keep), &options))
        );
    }

    #[test]
    fn equal_importance_is_none((weight, shape, keep, options) in anything()) {
        let plain = done(palettize("a", &weight, &shape, Some(&keep), &options));
        for number in [0.0, 1.0, 0.125] {
            let all = vec![number; weight.len()];
            prop_assert_eq!(&plain, &done(palettize_weighted("a", &weight, &shape, Some(&keep), &all, &options)));
        }
        // Weights of 0 and 1 give the same palettes as a mask, but elements of weight 0 are stored
        // too.
        let some: Vec<f64> = (0..weight.len()).map(|at| f64::from(u8::from(at % 3 > 0))).collect();
        let both: Vec<bool> = keep.iter().zip(&some).map(|(keep, some)| *keep && *some > 0.0).collect();
        let group_of = groups_of(&shape, plain.codebook.axis, plain.codebook.group_size);
        let some_left = |group| (0..weight.len()).any(|at| both[at] && group_of[at] == group);
        if !options.per_channel_scale && (0..plain.codebook.groups()).all(some_left) {
            let weighted = done(palettize_weighted("a", &weight, &shape, Some(&keep), &some, &options));
            prop_assert_eq!(weighted.codebook.palettes, done(palettize("a", &weight, &shape, Some(&both), &options)).codebook.palettes);
        }
    }
}

// ----------------------------------------------------------------------------------------------
// refusals

fn refusal(weight: &[f16], shape: &[usize], keep: Option<&[bool]>, options: &PaletteOptions) -> String {
    let error = palettize("mid.to_q", weight, shape, keep, options).unwrap_err();
    assert!(matches!(error, Error::Argument(_) | Error::Shape { .. } | Error::Range { .. }), "{error}");
    assert!(error.to_string().contains("mid.to_q"), "{error}");
    error.to_string()
}

#[test]
fn a_group_size_that_does_not_divide_is_never_silent() {
    let (shape, weight) = ([20, 6], random(120, 3));
    let asked = |size, axis| options(2, Some((size, axis)));
    assert!(refusal(&weight, &shape, None, &asked(8, 0)).contains("group_size 8 does not divide the 20 output"));
    assert!(refusal(&weight, &shape, None, &asked(4, 1)).contains("group_size 4 does not divide the 6 input"));
    assert!(refusal(&weight, &shape, None, &asked(40, 0)).contains("40"));

    for (size, axis, used) in [(8, 0, 5), (3, 0, 2), (40, 0, 20), (usize::MAX, 0, 20), (4, 1, 3), (7, 1, 6)] {
        assert_eq!(OnMisfit::SmallerGroup.outcome(shape[axis], size), Some(Misfit::SmallerGroup(used)));
        let codebook = done(palettize("a", &weight, &shape, None, &asked(used, axis))).codebook;
        assert_eq!((codebook.group_size, codebook.groups()), (used, shape[axis] / used));
    }
    assert_eq!(OnMisfit::Dense.outcome(shape[0], 8), Some(Misfit::Dense));
}

#[test]
fn bad_input_is_refused_by_name() {
    let (shape, weight) = ([4, 6], random(24, 4));
    for bits in [0, 5, 7, 9, 16, 255] {
        assert!(BitWidth::try_from(bits).unwrap_err().contains(&format!("{bits} bits")));
    }
    assert!(refusal(&weight, &shape, None, &options(4, Some((0, 0)))).contains("group_size is 0"));
    assert!(refusal(&weight, &shape, None, &options(4, Some((1, 2)))).contains("channel_axis is 2"));
    for shape in [&[][..], &[24], &[5, 6], &[4, 0], &[0, 4], &[usize::MAX, 2], &[4, 3]] {
        refusal(&weight, shape, None, &options(4, None));
    }
    refusal(&weight, &shape, Some(&[true; 23]), &options(4, None));
    for bad in [f16::NAN, f16::INFINITY, f16::NEG_INFINITY] {
        let mut weight = weight.clone();
        weight[7] = bad;
        let error = palettize("mid.to_q", &weight, &shape, None, &options(4, None)).unwrap_err();
        assert!(matches!(&error, Error::NotFinite(text) if text.contains("mid.to_q") && text.contains('7')), "{error}");
    }
    for bad in [f64::NAN, f64::INFINITY, -1.0, f64::MAX] {
        let error = palettize_weighted("mid.to_q", &weight, &shape, None, &[bad; 24], &options(2, None)).unwrap_err();
        assert!(error.to_string().contains("mid.to_q"), "{error}");
    }
    assert!(palettize_weighted("a", &weight, &shape, None, &[1.0; 23], &options(2, None)).is_err());
}

#[test]
fn fields_that_disagree_do_not_decode() {
    let (shape, weight) = ([4, 6], random(24, 5));
    let scaled = PaletteOptions { per_channel_scale: true, ..options(2, Some((2, 0))) };
    let good = done(palettize("a", &weight, &shape, None, &scaled));
    let refused = |change: &dyn Fn(&mut Palettized)| {
        let mut bad = good.clone();
        change(&mut bad);
        let error = bad.decode(None).unwrap_err();
        assert!(error.is_bad_input() && error.to_string().contains("`a`"), "{error}");
    };
    refused(&|bad| bad.shape = vec![4, 7]);
    refused(&|bad| bad.shape = vec![]);
    refused(&|bad| bad.codebook.axis = 2);
    refused(&|bad| bad.codebook.group_size = 0);
    refused(&|bad| bad.codebook.group_size = 3);
    refused(&|bad| bad.codebook.bits = BitWidth::Eight);
    refused(&|bad| bad.indices[3] = 4);
    refused(&|bad| bad.indices.truncate(23));
    refused(&|bad| bad.codebook.palettes.truncate(7));
    refused(&|bad| bad.codebook.scales = Some(vec![f16::ONE; 3].into()));
    assert!(good.decode(Some(&[true; 25])).is_err());
}

// ----------------------------------------------------------------------------------------------
// Vectors

/// coremltools clusters vectors with scikit-learn, whose k-means ends in a local optimum too.
#[test]
fn vectors_are_no_worse_than_coremltools() {
    let golden = Golden(tensors(&repo("tests/golden/vector-palettes.safetensors")));
    let mut seen = 0;
    for case in golden.0.keys().filter(|key| key.contains('/')) {
        let [layer, form, group] = case.split('/').collect::<Vec<_>>()[..] else { panic!("{case}") };
        let (length, bits) = form.trim_start_matches('v').split_once(".b").unwrap();
        let group = group.strip_prefix("gs").map(|size| (size.parse().unwrap(), 0));
        let options = PaletteOptions { vector_length: length.parse().unwrap(), ..options(bits.parse().unwrap(), group) };
        let weight = golden.values(layer);
        let ours = done(palettize(case, &weight, &golden.shape(layer), None, &options));
        let all = vec![true; weight.len()];
        let decoded = ours.decode(None).unwrap();
        let error = squared_error(&decoded, &weight, &all);
        assert!((error - ours.squared_error).abs() < 1e-9 * error);
        let theirs = squared_error(&golden.values(case), &weight, &all);
        assert!(error < 1.02 * theirs, "{case}: {error:.4e} and {theirs:.4e}");
        seen += 1;
    }
    assert_eq!(seen, 12);
}

#[test]
fn vectors_of_a_mask_are_left_out_and_parts_of_vectors_refused() {
    let weight = random(8 * 30, 5);
    let options = PaletteOptions { vector_length: 2, ..options(4, Some((4, 0))) };
    let mut keep: Vec<bool> = (0..240).map(|at| (at / 60 + at % 30) % 3 > 0).collect();
    let palettized = done(palettize("a", &weight, &[8, 30], Some(&keep), &options));
    assert_eq!((palettized.indices.len(), palettized.kept), (120, keep.iter().filter(|keep| **keep).count()));
    let decoded = palettized.decode(Some(&keep)).unwrap();
    assert!(decoded.iter().zip(&keep).all(|(value, keep)| *keep || value.to_bits() == 0));
    // What is pruned has no influence on what is kept.
    let other: Vec<f16> = weight.iter().zip(&keep).map(|(value, keep)| if *keep { *value } else { f16::MAX }).collect();
    let again = done(palettize("a", &other, &[8, 30], Some(&keep), &options));
    assert_eq!((again.codebook, again.indices), (palettized.codebook, palettized.indices));
    keep[0] = !keep[0];
    assert!(palettize("a", &weight, &[8, 30], Some(&keep), &options).unwrap_err().to_string().contains("a part of a vector"));
}
