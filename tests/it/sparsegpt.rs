//! Hessians, compared with brute force, and SparseGPT, compared with coremltools. Both are also
//! tested with difficult inputs.

use sdxl_squeeze::Error;
use sdxl_squeeze::codebook::{NmRatio, PruneOptions, Sparsity};
use sdxl_squeeze::solver::{Hessian, Note, Pruned, magnitude_prune, output_energy, output_error, prune};
use sdxl_squeeze::solver::{InputGeometry, Windows};
use tch::{Device, Kind, Tensor};

use crate::matrices::{correlated, hessian, numbers};
use crate::support::{relative_error, repo, tensors};

const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);
const DENSE: Windows = Windows { stride: [1; 2], padding: [0; 2], dilation: [1; 2], groups: 1 };

fn options(sparsity: Sparsity) -> PruneOptions {
    PruneOptions { sparsity, ..PruneOptions::default() }
}

fn half() -> PruneOptions {
    options(Sparsity::Unstructured(0.5))
}

fn bytes(tensor: &Tensor) -> Vec<u32> {
    Vec::<f32>::try_from(tensor.flatten(0, -1)).unwrap().into_iter().map(f32::to_bits).collect()
}

/// The squared error of the outputs that the sweep reports, relative to the squared norm of the
/// outputs.
fn lost(pruned: &Pruned, weight: &Tensor, hessian: &Hessian) -> f64 {
    pruned.loss / output_energy(weight, hessian).unwrap()
}

/// Asserts that exactly the elements that the mask prunes are zero.
fn consistent(pruned: &Pruned) {
    assert_eq!(pruned.weight.not_equal(0.0), pruned.mask);
    let share = 1.0 - pruned.mask.to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
    assert!((share - pruned.sparsity).abs() < 1e-9);
}

/// The Hessians [groups, d, d] in fp64, computed one pixel at a time.
fn brute_force(input: &Tensor, weight: [i64; 4], geometry: Windows) -> Tensor {
    let ([_, per_group, kh, kw], [b, c, h, w]) = (weight, <[i64; 4]>::try_from(input.size()).unwrap());
    let Windows { stride, padding, dilation, groups } = geometry;
    let pixels = Vec::<f64>::try_from(input.to_kind(Kind::Double).flatten(0, -1)).unwrap();
    let pixel = |b: i64, c_: i64, y: i64, x: i64| {
        let inside = (0..h).contains(&y) && (0..w).contains(&x);
        if inside { pixels[(((b * c + c_) * h + y) * w + x) as usize] } else { 0.0 }
    };
    let d = (per_group * kh * kw) as usize;
    let mut sums = vec![0.0; groups as usize * d * d];
    for group in 0..groups {
        let sums = &mut sums[group as usize * d * d..][..d * d];
        for item in 0..b {
            for y in (0..).map(|i| i * stride[0]).take_while(|y| y + dilation[0] * (kh - 1) < h + 2 * padding[0]) {
                for x in (0..).map(|i| i * stride[1]).take_while(|x| x + dilation[1] * (kw - 1) < w + 2 * padding[1]) {
                    let mut vector = Vec::with_capacity(d);
                    for channel in group * per_group..(group + 1) * per_group {
                        for i in 0..kh {
                            for j in 0..kw {
                                let (y, x) = (y + i * dilation[0] - padding[0], x + j * dilation[1] - padding[1]);
                                vector.push(pixel(item, channel, y, x));
                            }
                        }
                    }
                    for (row, a) in sums.chunks_mut(d).zip(&vector) {
                        row.iter_mut().zip(&vector).for_each(|(sum, b)| *sum += a * b * 2.0 / input.size()[0] as f64);
                    }
                }
            }
        }
    }
    Tensor::from_slice(&sums).reshape([groups, d as i64, d as i64])
}

#[test]
fn hessians_of_every_convolution_equal_brute_force() {
    let input = numbers(&[3, 4, 10, 9], 1);
    for kernel in [[1, 1], [3, 3], [5, 5], [3, 1]] {
        for stride in [[1, 1], [2, 2], [2, 1]] {
            for padding in [[0, 0], [1, 1], [2, 2], [0, 2]] {
                for dilation in [[1, 1], [2, 2]] {
                    for groups in [1, 2, 4] {
                        let geometry = Windows { stride, padding, dilation, groups };
                        let weight = [8, 4 / groups, kernel[0], kernel[1]];
                        let mut hessian = Hessian::for_weight(InputGeometry::Windows(geometry), &weight, Device::Cpu).unwrap();
                        hessian.add(&input.narrow(0, 0, 1)).unwrap();
                        hessian.add(&input.narrow(0, 1, 2)).unwrap();
                        assert_eq!(hessian.samples(), 3);
                        let error = relative_error(&hessian.matrix().unwrap(), &brute_force(&input, weight, geometry));
                        assert!(error < 1e-5, "{weight:?} {geometry:?}: {error:.1e}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_linears_hessian_counts_as_coremltools() {
    // The inputs are wider than a panel of columns.
    let inputs = numbers(&[2, 3, 5, 300], 2);
    let mut hessian = hessian(&inputs);
    assert_eq!((hessian.vectors(), hessian.samples()), (30, 2));
    hessian.add(&inputs.select(0, 0).select(0, 0).to_kind(Kind::Half)).unwrap();
    assert_eq!((hessian.vectors(), hessian.samples()), (35, 3));
    hessian.add(&inputs.select(0, 0).select(0, 0).select(0, 0)).unwrap();
    assert_eq!((hessian.vectors(), hessian.samples()), (36, 4));
    hessian.add(&Tensor::zeros([0, 300], CPU)).unwrap();
    assert_eq!((hessian.vectors(), hessian.samples()), (36, 4));

    let rows = inputs.reshape([-1, 300]);
    let half = rows.narrow(0, 0, 5).to_kind(Kind::Half).to_kind(Kind::Float);
    let rows = Tensor::cat(&[&rows, &half, &rows.narrow(0, 0, 1)], 0).to_kind(Kind::Double);
    let matrix = hessian.matrix().unwrap();
    assert!(relative_error(&matrix.squeeze_dim(0), &(rows.tr().matmul(&rows) * 2.0 / 4.0)) < 1e-6);
    assert_eq!(matrix, matrix.transpose(1, 2));
}

#[test]
fn merging_is_adding_one_after_the_other() {
    let (first, second) = (numbers(&[2, 20, 33], 3), numbers(&[3, 11, 33], 4));
    let mut merged = hessian(&first);
    merged.merge(hessian(&second)).unwrap();
    let mut added = hessian(&first);
    added.add(&second).unwrap();
    assert_eq!((merged.vectors(), merged.samples()), (added.vectors(), added.samples()));
    assert!(relative_error(&merged.matrix().unwrap(), &added.matrix().unwrap()) < 1e-6);
    assert!(matches!(merged.merge(hessian(&numbers(&[4, 34], 5))), Err(Error::Shape { .. })));
}

#[test]
fn pruned_weights_equal_those_of_coremltools() {
    let golden = tensors(&repo("tests/golden/sparsegpt.safetensors"));
    let stride_2 = Windows::new(2, 1);
    let layers = [
        ("linear-dead", InputGeometry::Linear),
        ("linear", InputGeometry::Linear),
        ("conv-stride-2", InputGeometry::Windows(stride_2)),
        ("conv-3x3", InputGeometry::Windows(Windows::new(1, 1))),
        ("conv-1x1", InputGeometry::Windows(DENSE)),
    ];
    let mut compared = 0;
    for (name, kind) in layers {
        let weight = &golden[&format!("{name}.weight")];
        let mut hessian = Hessian::for_weight(kind, &weight.size(), Device::Cpu).unwrap();
        for index in 0.. {
            let Some(input) = golden.get(&format!("{name}.input.{index}")) else { break };
            hessian.add(input).unwrap();
        }
        if let Some(theirs) = golden.get(&format!("{name}.hessian")) {
            let error = relative_error(&hessian.matrix().unwrap().squeeze_dim(0), theirs);
            assert!(error < 1e-5, "{name}: Hessian {error:.1e}");
        }
        let recipes = [
            ("40", Sparsity::Unstructured(0.4)),
            ("50", Sparsity::Unstructured(0.5)),
            ("2of4", Sparsity::NOfM(NmRatio { n: 2, m: 4 })),
        ];
        for (recipe, sparsity) in recipes {
            let theirs = golden[&format!("{name}.{recipe}")].flatten(1, -1);
            let ours = prune(weight, &hessian, &options(sparsity)).unwrap();
            let error = relative_error(&ours.weight, &theirs);
            let worst = ((&ours.weight - &theirs).abs().max() / theirs.abs().max()).double_value(&[]);
            assert_eq!(ours.weight.not_equal(0.0), theirs.not_equal(0.0), "{name} {recipe}: another mask");
            assert!(error < 1e-4 && worst < 1e-4, "{name} {recipe}: weights {error:.1e}, at worst {worst:.1e}");
            consistent(&ours);
            let dead = ours.notes.contains(&Note::DeadColumns { count: 1, of: 200 });
            assert_eq!(dead, name == "linear-dead", "{:?}", ours.notes);
            compared += 1;
        }
    }
    assert_eq!(compared, 15);
}

#[test]
fn far_better_than_magnitudes_on_correlated_inputs() {
    let (weight, hessian) = (numbers(&[64, 192], 6), hessian(&correlated(600, 192, 8, 7)));
    for sparsity in [Sparsity::Unstructured(0.5), Sparsity::NOfM(NmRatio { n: 2, m: 4 })] {
        let ours = prune(&weight, &hessian, &options(sparsity)).unwrap();
        let magnitude = magnitude_prune(&weight, sparsity, 1).unwrap();
        let theirs = output_error(&weight, &magnitude.weight, &hessian).unwrap();
        let ours = output_error(&weight, &ours.weight, &hessian).unwrap();
        assert!(ours < 0.5 * theirs, "{sparsity:?}: {ours:.4} against {theirs:.4}");
    }
}

#[test]
fn the_error_is_that_of_the_outputs() {
    let inputs = correlated(500, 300, 9, 8);
    let weight = numbers(&[24, 300], 9);
    let pruned = prune(&weight, &hessian(&inputs), &half()).unwrap();
    let output = |weight: &Tensor| inputs.to_kind(Kind::Double).matmul(&weight.to_kind(Kind::Double).tr());
    let expected = relative_error(&output(&pruned.weight), &output(&weight)).powi(2);
    let found = output_error(&weight, &pruned.weight, &hessian(&inputs)).unwrap();
    assert!((found / expected - 1.0).abs() < 1e-5, "{found} {expected}");
    let summed = lost(&pruned, &weight, &hessian(&inputs));
    assert!((summed / expected - 1.0).abs() < 1e-3, "{summed} {expected}");
    assert_eq!(output_error(&weight, &weight, &hessian(&inputs)).unwrap(), 0.0);
    assert_eq!(output_error(&weight.zeros_like(), &weight, &hessian(&inputs)).unwrap(), f64::INFINITY);
}

#[test]
fn the_sparsity_is_the_one_asked_for() {
    for (o, d) in [(64, 130), (64, 500), (200, 96)] {
        let (weight, hessian) = (numbers(&[o, d], 10), hessian(&correlated(700, d, 12, 11)));
        for share in [0.05, 0.333, 0.4, 0.5, 0.75, 0.9] {
            let pruned = prune(&weight, &hessian, &options(Sparsity::Unstructured(share))).unwrap();
            consistent(&pruned);
            assert!((pruned.sparsity - share).abs() < 0.001, "{o} x {d}: {} for {share}", pruned.sparsity);
            assert_eq!(pruned.notes, []);
            let magnitude = magnitude_prune(&weight, Sparsity::Unstructured(share), 1).unwrap();
            let kept = magnitude.mask.to_kind(Kind::Int64).sum(Kind::Int64).int64_value(&[]);
            assert_eq!(kept, o * d - ((o * d) as f64 * share) as i64);
        }
        let untouched = prune(&weight, &hessian, &options(Sparsity::Unstructured(0.0))).unwrap();
        assert_eq!(untouched.weight, weight);
        assert_eq!((untouched.loss, untouched.sparsity), (0.0, 0.0));
    }
}

#[test]
fn n_of_every_m() {
    let weight = numbers(&[9, 131], 12);
    let hessian = hessian(&correlated(400, 131, 14, 13));
    for (n, m) in [(1, 2), (2, 4), (1, 4), (3, 5), (4, 7), (60, 100), (100, 130), (3, 200)] {
        let sparsity = Sparsity::NOfM(NmRatio { n, m });
        let pruned = prune(&weight, &hessian, &options(sparsity)).unwrap();
        consistent(&pruned);
        let magnitude = magnitude_prune(&weight, sparsity, 1).unwrap();
        for mask in [&pruned.mask, &magnitude.mask] {
            for row in 0..9 {
                let kept = Vec::<bool>::try_from(mask.select(0, row)).unwrap();
                let groups = kept.chunks_exact(m);
                assert!(groups.remainder().iter().all(|kept| *kept), "{n}:{m}");
                assert!(groups.into_iter().all(|group| group.iter().filter(|kept| !**kept).count() == n), "{n}:{m}");
            }
        }
        let rest = (131 % m) as u64;
        assert_eq!(pruned.notes.contains(&Note::IncompleteGroup { columns: rest, m: m as u64 }), rest > 0);
    }
}

#[test]
fn any_block_size() {
    let (weight, hessian) = (numbers(&[64, 100], 14), hessian(&correlated(400, 100, 16, 15)));
    for block in [1, 7, 100, 128, usize::MAX] {
        for sparsity in [Sparsity::Unstructured(0.5), Sparsity::NOfM(NmRatio { n: 2, m: 4 })] {
            let pruned = prune(&weight, &hessian, &PruneOptions { sparsity, dampening: 0.01, block, rows_together: 1 }).unwrap();
            consistent(&pruned);
            assert!(
                (0.49..0.52).contains(&pruned.sparsity) && lost(&pruned, &weight, &hessian) < 0.1,
                "{block}: {} {}",
                pruned.sparsity,
                lost(&pruned, &weight, &hessian)
            );
        }
    }
}

#[test]
fn each_group_has_its_own_hessian() {
    let (input, weight) = (numbers(&[4, 8, 9, 9], 16), numbers(&[6, 4, 3, 3], 17));
    let geometry = Windows { groups: 2, ..Windows::new(1, 1) };
    let mut both = Hessian::for_weight(InputGeometry::Windows(geometry), &weight.size(), Device::Cpu).unwrap();
    both.add(&input).unwrap();
    let options = options(Sparsity::NOfM(NmRatio { n: 2, m: 4 }));
    let pruned = prune(&weight, &both, &options).unwrap();
    consistent(&pruned);
    for group in 0..2 {
        let kind = InputGeometry::Windows(Windows::new(1, 1));
        let weight = weight.narrow(0, group * 3, 3);
        let mut alone = Hessian::for_weight(kind, &weight.size(), Device::Cpu).unwrap();
        alone.add(&input.narrow(1, group * 4, 4)).unwrap();
        // The Hessian of one group is computed from correlations, and that of two groups from
        // unfolded inputs, so they are rounded differently.
        let (alone, both) = (prune(&weight, &alone, &options).unwrap(), pruned.weight.narrow(0, group * 3, 3));
        assert_eq!(alone.mask, both.not_equal(0.0));
        assert!(relative_error(&alone.weight, &both) < 1e-5);
    }

    // In a depthwise convolution each group has one row of nine columns. The sparsity holds over
    // all groups together.
    let (input, weight) = (numbers(&[2, 64, 9, 9], 18), numbers(&[64, 1, 3, 3], 19));
    let geometry = Windows { groups: 64, ..Windows::new(2, 1) };
    let mut hessian = Hessian::for_weight(InputGeometry::Windows(geometry), &weight.size(), Device::Cpu).unwrap();
    hessian.add(&input).unwrap();
    let pruned = prune(&weight, &hessian, &half()).unwrap();
    consistent(&pruned);
    assert!((pruned.sparsity - 0.5).abs() < 0.001, "{}", pruned.sparsity);
}

#[test]
fn the_same_bytes_on_any_number_of_threads() {
    let run = |sparsity| {
        let (inputs, weight) = (correlated(700, 333, 21, 20), numbers(&[77, 333], 21));
        bytes(&prune(&weight, &hessian(&inputs), &options(sparsity)).unwrap().weight)
    };
    for sparsity in [Sparsity::Unstructured(0.4), Sparsity::NOfM(NmRatio { n: 2, m: 4 })] {
        let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let expected = pool(1).install(|| run(sparsity));
        assert_eq!(pool(3).install(|| run(sparsity)), expected);
        let threads = tch::get_num_threads();
        for count in [1, 2] {
            tch::set_num_threads(count);
            assert_eq!(run(sparsity), expected, "{count} threads of libtorch");
        }
        tch::set_num_threads(threads);
    }
}

#[test]
fn a_hessian_of_rank_one_works_and_is_noted() {
    let weight = numbers(&[64, 150], 22);
    let hessian = hessian(&(1e3 * numbers(&[1, 150], 23)));
    let pruned = prune(&weight, &hessian, &half()).unwrap();
    consistent(&pruned);
    assert_eq!(pruned.notes, [Note::FewVectors { vectors: 1, dimension: 150 }]);
    assert!(lost(&pruned, &weight, &hessian) < 0.01, "{}", pruned.loss);

    let bare = prune(&weight, &hessian, &PruneOptions { dampening: 0.0, ..half() }).unwrap();
    assert!(
        bare.notes.iter().any(|note| matches!(note, Note::MoreDampening { asked: 0.0, used } if *used > 0.0)),
        "{:?}",
        bare.notes
    );
    assert!(bare.weight.isfinite().all().int64_value(&[]) == 1);
}

#[test]
fn dead_columns_go_first() {
    let inputs = correlated(300, 80, 25, 24);
    let _ = inputs.narrow(1, 8, 72).fill_(0.0);
    let weight = numbers(&[64, 80], 25);
    let pruned = prune(&weight, &hessian(&inputs), &options(Sparsity::Unstructured(0.3))).unwrap();
    assert_eq!(pruned.weight.narrow(1, 8, 72).abs().max().double_value(&[]), 0.0);
    assert!(pruned.notes.contains(&Note::DeadColumns { count: 72, of: 80 }));
    assert!(pruned.notes.iter().any(|note| matches!(note, Note::SparsityOff { .. })), "{:?}", pruned.notes);
    consistent(&pruned);
    assert!(lost(&pruned, &weight, &hessian(&inputs)) < 1e-6, "{}", pruned.loss);
    assert!(prune(&weight, &hessian(&inputs.zeros_like()), &half()).unwrap().weight.count_nonzero(None).int64_value(&[]) == 0);
}

#[test]
fn hostile_inputs_are_refused() {
    let good = hessian(&numbers(&[50, 12], 26));
    let weight = numbers(&[5, 12], 27);
    let range = |result: Result<Pruned, Error>| assert!(matches!(result, Err(Error::Range { .. })), "{result:?}");
    for sparsity in [-0.1, 1.0, 1.5, f64::NAN, f64::INFINITY] {
        range(prune(&weight, &good, &options(Sparsity::Unstructured(sparsity))));
    }
    for (n, m) in [(0, 4), (4, 4), (5, 4), (0, 0), (1, 0)] {
        range(prune(&weight, &good, &options(Sparsity::NOfM(NmRatio { n, m }))));
    }
    for dampening in [-1.0, f64::NAN, f64::INFINITY] {
        range(prune(&weight, &good, &PruneOptions { dampening, ..half() }));
    }
    range(prune(&weight, &good, &PruneOptions { block: 0, ..half() }));
    for shape in [&[5, 11][..], &[12], &[], &[0, 12], &[5, 2, 3, 3]] {
        let result = prune(&Tensor::ones(shape, CPU), &good, &half());
        assert!(matches!(result, Err(Error::Shape { .. })), "{result:?}");
    }
    let result = prune(&weight, &Hessian::new(12, Device::Cpu).unwrap(), &half());
    assert!(matches!(result, Err(Error::State(_))), "{result:?}");

    for bad in [f64::NAN, f64::INFINITY] {
        let spoiled = weight.copy();
        let _ = spoiled.get(1).fill_(bad);
        assert!(matches!(prune(&spoiled, &good, &half()), Err(Error::NotFinite(_))));
        let mut hessian = hessian(&numbers(&[50, 12], 26));
        assert!(matches!(hessian.add(&spoiled), Err(Error::NotFinite(_))));
        assert_eq!((hessian.vectors(), hessian.matrix().unwrap()), (50, good.matrix().unwrap()));
        assert!(matches!(magnitude_prune(&spoiled, Sparsity::Unstructured(0.5), 1), Err(Error::NotFinite(_))));
    }
    assert!(matches!(prune(&weight, &hessian(&Tensor::full([9, 12], 1e30, CPU)), &half()), Err(Error::NotFinite(_))));
    let tiny = prune(&weight, &hessian(&(1e-21 * numbers(&[50, 12], 28))), &half());
    assert!(matches!(tiny, Ok(_) | Err(Error::NotPositiveDefinite { .. })), "{tiny:?}");

    for shape in [&[][..], &[13], &[3, 11], &[12, 3]] {
        assert!(matches!(Hessian::new(12, Device::Cpu).unwrap().add(&Tensor::ones(shape, CPU)), Err(Error::Shape { .. })));
    }
    assert!(Hessian::new(0, Device::Cpu).is_err() && Hessian::new(-3, Device::Cpu).is_err());
    let conv = |groups, stride, shape: &[i64]| {
        let geometry = Windows { groups, stride: [stride; 2], ..DENSE };
        Hessian::for_weight(InputGeometry::Windows(geometry), shape, Device::Cpu)
    };
    for (groups, stride, shape) in
        [(0, 1, &[4, 4, 3, 3][..]), (3, 1, &[4, 4, 3, 3]), (1, 0, &[4, 4, 3, 3]), (1, 1, &[4, 4]), (1, 1, &[4, 4, 0, 3])]
    {
        assert!(matches!(conv(groups, stride, shape), Err(Error::Shape { .. })), "{shape:?}");
    }
    assert!(Hessian::for_weight(InputGeometry::Linear, &[4, 4, 3, 3], Device::Cpu).is_err());
    let mut window = conv(1, 1, &[4, 4, 3, 3]).unwrap();
    for shape in [&[4, 5, 5][..], &[2, 3, 5, 5], &[2, 4, 2, 2]] {
        assert!(window.add(&Tensor::ones(shape, CPU)).is_err(), "{shape:?}");
    }
    assert_eq!(window.vectors(), 0);
}
