//! Times of palettizing one large weight with several settings.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use half::f16;
use rand::{RngExt, SeedableRng};
use sdxl_squeeze::codebook::{BitWidth, Grouping, PaletteOptions};
use sdxl_squeeze::solver::palette::palettize;

const SHAPE: [usize; 2] = [5120, 1280];

fn palettes(criterion: &mut Criterion) {
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(0);
    let count = SHAPE.iter().product();
    let weight: Vec<f16> =
        (0..count).map(|_| f16::from_f32(0.02 * random.sample::<f32, _>(rand_distr::StandardNormal))).collect();
    let keep: Vec<bool> = (0..count).map(|_| random.random_bool(0.6)).collect();

    let grouped = |group_size| Grouping::PerGroupedChannel { group_size };
    let cases = [
        ("4 bits, gs16", BitWidth::Four, grouped(16), None),
        ("4 bits, gs16, 40 % pruned", BitWidth::Four, grouped(16), Some(keep.as_slice())),
        ("4 bits, gs4", BitWidth::Four, grouped(4), None),
        ("4 bits per tensor", BitWidth::Four, Grouping::PerTensor, None),
        ("8 bits per tensor", BitWidth::Eight, Grouping::PerTensor, None),
    ];
    let mut group = criterion.benchmark_group("palettes of 5120x1280");
    group.sample_size(10);
    for (name, bits, grouping, keep) in cases {
        let options = PaletteOptions { bits, grouping, ..PaletteOptions::default() };
        group.bench_function(name, |bench| bench.iter(|| palettize("weight", black_box(&weight), &SHAPE, keep, &options)));
    }
    group.finish();
}

criterion_group!(benches, palettes);
criterion_main!(benches);
