use half::f16;
use sdxl_model::checkpoint::TensorSource;
use sdxl_model::unet::Conditioning;
use sdxl_pipeline::PipelineFolder;
use squeeze_base::error::Result;
use squeeze_base::progress::Silent;
use squeeze_codebook::{BitWidth, Codebook};
use squeeze_container::CompressedWeight;
use squeeze_numerics::device::Placement;
use squeeze_numerics::random::noise;
use tch::{Device, Kind, Tensor};

use super::backward::{Gradients, add_gradient, predict};
use super::lesson::squared_errors;
use super::parameters::Parameters;
use super::table::Table;
use crate::calibration::Sample;
use crate::synth::{Preset, synthesize};

/// A made-up weight with palettes of multiples of 1/1024, which fp16 holds, as it does their
/// neighbours.
fn palettized(shape: &[i64], axis: usize, group_size: usize, masked: bool, scaled: bool, seed: u64) -> CompressedWeight {
    vectors(shape, axis, group_size, masked, scaled, 1, seed)
}

/// As [`palettized`], with `length` output channels that share an index.
fn vectors(
    shape: &[i64],
    axis: usize,
    group_size: usize,
    masked: bool,
    scaled: bool,
    length: usize,
    seed: u64,
) -> CompressedWeight {
    let numel: i64 = shape.iter().product::<i64>() / length as i64;
    let random = |count: i64, seed: u64| Vec::<f32>::try_from(noise(&[count], seed, Kind::Float).unwrap()).unwrap();
    let groups = shape[axis] as usize / group_size;
    let entry = |value: f32| f16::from_f32((value * 128.0).round() / 1024.0);
    let codebook = Codebook {
        bits: BitWidth::Two,
        axis,
        group_size,
        vector_length: length,
        palettes: random((4 * groups * length) as i64, seed).into_iter().map(entry).collect(),
        scales: scaled.then(|| random(shape[0], seed + 1).into_iter().map(|scale| f16::from_f32(scale.abs() + 0.5)).collect()),
    };
    let indices: Vec<u8> = random(numel, seed + 2).into_iter().map(|value| (value.abs() * 2.0) as u8 & 3).collect();
    let keep: Vec<bool> = random(numel, seed + 3).into_iter().map(|value| value > -0.2).collect();
    CompressedWeight::palettized(shape.to_vec(), masked.then_some(keep.as_slice()), codebook, &indices).unwrap()
}

#[test]
fn tables_decode_as_containers_do_and_their_gradient_is_that_of_the_definition() {
    let weights = [
        (&[8_i64, 6][..], 0, 4, 1),
        (&[8, 6], 1, 3, 1),
        (&[4, 6, 3, 3], 0, 2, 1),
        (&[4, 6, 3, 3], 1, 2, 1),
        (&[8, 6], 0, 4, 2),
        (&[8, 6, 3, 3], 0, 8, 4),
    ];
    for (shape, axis, group_size, length) in weights {
        for (masked, scaled) in [(false, false), (true, false), (false, true), (true, true)] {
            if scaled && length > 1 {
                continue;
            }
            let weight = vectors(shape, axis, group_size, masked, scaled, length, 3);
            let (table, palettes) = Table::of(&weight, Device::Cpu).unwrap().unwrap();
            let value = Tensor::from_slice(&palettes).to_kind(Kind::Float);
            let decoded = table.decode(&value).unwrap();
            assert_eq!(decoded.size(), shape);
            let expected = Tensor::from_slice(&weight.decode().unwrap()).view(shape);
            assert_eq!(decoded.to_kind(Kind::Half), expected, "{shape:?} {axis} {masked} {scaled}");

            // By definition: each entry's share of the weight is what the weight is with that entry
            // one and all others zero.
            let of_weight = noise(shape, 9, Kind::Float).unwrap();
            let gradient = Vec::<f64>::try_from(table.gradient(&of_weight).unwrap().to_kind(Kind::Double)).unwrap();
            for (entry, gradient) in gradient.into_iter().enumerate() {
                let one = Tensor::zeros([palettes.len() as i64], (Kind::Float, Device::Cpu));
                let _ = one.get(entry as i64).fill_(1.0);
                let expected = (table.decode(&one).unwrap() * &of_weight).sum(Kind::Double).double_value(&[]);
                assert!((gradient - expected).abs() <= 1e-4 * expected.abs().max(1.0), "{entry}: {gradient}, not {expected}");
            }
        }
    }
}

/// Vectors of a made-up network, in multiples of 1/1024, and its other tensors.
struct MadeUp;

impl TensorSource for MadeUp {
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor> {
        let seed = name.bytes().fold(7, |seed, byte| seed * 31 % 1_000_003 + u64::from(byte));
        let scale = if shape.len() == 1 { 0.2 } else { 0.05 };
        let values = noise(shape, seed, Kind::Double)? * scale
            + if name.contains("norm") && name.ends_with(".weight") { 1.0 } else { 0.0 };
        Ok((values * 1024.0).round() / 1024.0)
    }
}

/// In fp64 a difference of 1/1024 of one value, which fp16 holds, is a sharp measure of the
/// gradient by that value.
#[test]
fn gradients_are_those_of_finite_differences() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("model");
    synthesize(Preset::Tiny, &root, 0, Kind::Half, &Silent).unwrap();
    let folder = PipelineFolder::open(&root).unwrap();
    let (chain, config) = (&folder.unet, folder.unet.config());
    let placement = Placement { device: Device::Cpu, kind: Kind::Double };
    let shapes: std::collections::BTreeMap<String, Vec<i64>> =
        chain.tensors().unwrap().into_iter().map(|spec| (spec.name, spec.shape)).collect();
    let weight = |name: &str| -> Result<Option<CompressedWeight>> {
        let shape = &shapes[name];
        // Every second matrix, so that some weights stay as they are.
        let chosen = shape.len() > 1 && shape[0] % 4 == 0 && name.len().is_multiple_of(2);
        Ok(chosen.then(|| palettized(shape, 0, 4, name.len().is_multiple_of(4), false, name.len() as u64)))
    };
    let mut parameters = Parameters::new(chain.tensors().unwrap(), &weight, &MadeUp, placement).unwrap();
    let pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim;
    let call = |seed: u64, timestep: f64| Sample {
        sample: noise(&[2, config.in_channels, 8, 8], seed, Kind::Double).unwrap(),
        timestep,
        conditioning: Conditioning {
            encoder_hidden_states: noise(&[2, 5, config.cross_attention_dim], seed + 1, Kind::Double).unwrap(),
            text_embeds: noise(&[2, pooled], seed + 2, Kind::Double).unwrap(),
            time_ids: Tensor::from_slice(&[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]).view([1, 6]).repeat([2, 1]),
            timestep_cond: None,
        },
    };
    let calls = [call(10, 900.0), call(20, 100.0)];
    let calls: Vec<&Sample> = calls.iter().collect();
    let target = noise(&[4, config.out_channels, 8, 8], 30, Kind::Double).unwrap();
    let factors = Tensor::from_slice(&[0.3, 1.1]);
    // In fp64 all the way, unlike in training.
    let loss = |prediction: &Tensor| -> Result<Tensor> {
        let error = (prediction - &target).view([2, 2, -1]);
        let guided = error.select(1, 1) * 4.0 - error.select(1, 0) * 3.0;
        Ok((guided.square().sum_dim_intlist([1_i64].as_slice(), false, Kind::Double) * &factors).sum(Kind::Double))
    };
    let mut gradients = Gradients::new();
    let value = add_gradient(chain, &parameters, &calls, &loss, 1.0, &mut gradients).unwrap();
    let at = |parameters: &Parameters<'_>| loss(&predict(chain, parameters, &calls).unwrap()).unwrap().double_value(&[]);
    assert!((value - at(&parameters)).abs() < 1e-9 * value);
    // The loss of training is this one in fp32.
    let trained = squared_errors(&predict(chain, &parameters, &calls).unwrap(), &target, 2, 4.0).unwrap();
    assert!(((trained * &factors).sum(Kind::Double).double_value(&[]) - value).abs() < 1e-5 * value);

    let names: Vec<String> = parameters.by_name.keys().cloned().collect();
    assert_eq!(gradients.keys().cloned().collect::<Vec<_>>(), names, "every parameter has a gradient");
    let palettes = names.iter().filter(|name| shapes[*name].len() > 1).count();
    assert!(palettes > 20 && names.len() - palettes > 50, "{palettes} of {}", names.len());
    let step = 1.0 / 1024.0;
    for (number, name) in names.iter().enumerate().filter(|(number, _)| number % 29 == 0) {
        let before = parameters.by_name[name].value.shallow_clone();
        let entry = number as i64 % before.numel() as i64;
        let mut moved = |by: f64| {
            let value = before.copy();
            let _ = value.get(entry).f_add_scalar_(by).unwrap();
            parameters.by_name.get_mut(name).unwrap().value = value;
            at(&parameters)
        };
        // Central differences of the fourth order.
        let difference = (8.0 * (moved(step) - moved(-step)) - (moved(2.0 * step) - moved(-2.0 * step))) / (12.0 * step);
        parameters.by_name.get_mut(name).unwrap().value = before;
        let gradient = gradients[name].double_value(&[entry]);
        assert!(
            (gradient - difference).abs() < 1e-4 * difference.abs().max(1e-3 * value),
            "{name} {entry}: {gradient}, not {difference}"
        );
    }
}
