//! Times of UNet forwards and of single stages, on the bundled model.
//!
//! `benches/forward_vs_diffusers.sh` compares the full-size model with diffusers.

use std::path::Path;

use criterion::{Criterion, criterion_group, criterion_main};
use sdxl_squeeze::device::Placement;
use sdxl_squeeze::model::Unobserved;
use sdxl_squeeze::model::unet::{Conditioning, Unet};
use sdxl_squeeze::pipeline::PipelineFolder;
use sdxl_squeeze::progress::Silent;
use tch::{Device, Kind, Tensor};

fn forwards(c: &mut Criterion) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/emoji-sdxl");
    let folder = PipelineFolder::open(&root).expect("the bundled model");
    let weights = folder.unet_weights().expect("the weights of the UNet");
    let unet = Unet::resident(folder.unet.clone(), weights.source(Placement::CPU), &Silent).expect("the UNet");
    let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu));
    let conditioning = Conditioning {
        encoder_hidden_states: random(&[2, 77, 160]),
        text_embeds: random(&[2, 96]),
        time_ids: Tensor::from_slice(&[64f32, 64.0, 0.0, 0.0, 64.0, 64.0]).unsqueeze(0).repeat([2, 1]),
        timestep_cond: None,
    };
    let sample = random(&[2, 4, 16, 16]);
    c.bench_function("unet/emoji/batch 2", |b| b.iter(|| unet.forward(&sample, 500.0, &conditioning, &mut Unobserved)));

    let source = weights.source(Placement::CPU);
    let input_block = folder.unet.load_input_block(&source).expect("the input block");
    let mut carry = input_block.forward(&sample, 500.0, &conditioning, &mut Unobserved).expect("a carry");
    for spec in folder.unet.stages() {
        let stage = spec.load(&source).expect("a stage");
        let name = format!("stage/emoji/{}", spec.name());
        c.bench_function(&name, |b| b.iter(|| stage.forward(carry.shallow_clone(), &mut Unobserved)));
        carry = stage.forward(carry, &mut Unobserved).expect("a carry");
    }
    c.bench_function("load/emoji unet", |b| {
        b.iter(|| Unet::resident(folder.unet.clone(), weights.source(Placement::CPU), &Silent));
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20);
    targets = forwards
}
criterion_main!(benches);
