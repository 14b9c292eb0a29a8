//! Times of the Hessian, the factor and the pruning of one layer of SDXL's middle block:
//! 1,280 x 1,280 elements, 2,048 input vectors.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use sdxl_squeeze::codebook::{NmRatio, PruneOptions, Sparsity};
use sdxl_squeeze::solver::{Factor, Hessian, prune};
use tch::{Device, Kind, Tensor};

fn square_layer(criterion: &mut Criterion) {
    tch::manual_seed(0);
    let options = (Kind::Float, Device::Cpu);
    let (inputs, weight) = (Tensor::randn([2048, 1280], options), Tensor::randn([1280, 1280], options));
    let mut hessian = Hessian::new(1280, Device::Cpu).expect("memory for a Hessian");
    hessian.add(&inputs).expect("an input that fits");

    let mut group = criterion.benchmark_group("1280x1280");
    group.sample_size(10);
    group.bench_function("hessian", |bencher| {
        bencher.iter(|| Hessian::new(1280, Device::Cpu).and_then(|mut hessian| hessian.add(black_box(&inputs))));
    });
    group.bench_function("factor", |bencher| bencher.iter(|| Factor::new(black_box(&hessian), 0, 0.01)));
    for (name, sparsity) in [("prune 40 %", Sparsity::Unstructured(0.4)), ("prune 2:4", Sparsity::NOfM(NmRatio { n: 2, m: 4 }))] {
        let options = PruneOptions { sparsity, ..PruneOptions::default() };
        group.bench_function(name, |bencher| bencher.iter(|| prune(black_box(&weight), &hessian, &options)));
    }
    group.finish();
}

criterion_group!(benches, square_layer);
criterion_main!(benches);
