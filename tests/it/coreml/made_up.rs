//! A container with weights of every kind.

use std::path::Path;

use half::f16;
use sdxl_squeeze::checkpoint::{ConfigFile, TensorSource};
use sdxl_squeeze::codebook::{BitWidth, Codebook};
use sdxl_squeeze::container::{CompressedWeight, ContainerInfo, ContainerWriter, Network};
use sdxl_squeeze::device::Placement;
use sdxl_squeeze::pipeline::PipelineFolder;
use serde_json::{Value, json};
use tch::{Device, Kind};

/// A pseudorandom number that depends only on `i`.
fn scrambled(i: usize) -> u64 {
    let mixed = (i as u64).wrapping_add(0x1234_5678).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 20
}

/// Compresses the UNet of `model` and treats each layer differently. The container has all widths
/// of indices, both axes, masks of all densities, scales, vectors, weights that are only pruned,
/// and some that are stored dense. Palette entries are values of the layer, so that the UNet still
/// computes sensible numbers.
pub(crate) fn container(model: &Path, path: &Path) {
    write(model, path, true);
}

/// As [`container`], but weights with vectors are never pruned: coremltools 9.0 cannot convert
/// those.
pub(crate) fn container_without_masked_vectors(model: &Path, path: &Path) {
    write(model, path, false);
}

fn write(model: &Path, path: &Path, masked_vectors: bool) {
    let pipeline = PipelineFolder::open(model).unwrap();
    let weights = pipeline.unet_weights().unwrap();
    let source = weights.source(Placement { device: Device::Cpu, kind: Kind::Half });
    let info = ContainerInfo {
        network: Network::Unet,
        config: ConfigFile::read(&model.join("unet/config.json")).unwrap().into_entries(),
        recipe: json!({ "made": "up" }),
        sources: Vec::new(),
        prediction_type: None,
    };
    let mut writer = ContainerWriter::create(path, info).unwrap();
    let mut layer = 0;
    for spec in pipeline.unet.tensors().unwrap() {
        let tensor = source.tensor(&spec.name, &spec.shape).unwrap();
        let values = Vec::<f16>::try_from(&tensor.flatten(0, -1)).unwrap();
        if spec.shape.len() < 2 || layer % 17 == 16 {
            layer += usize::from(spec.shape.len() > 1);
            writer.add_tensor(&spec.name, &spec.shape, &values).unwrap();
            continue;
        }
        let weight = compressed(layer, &spec.shape, &values, masked_vectors);
        writer.add_weight(&spec.name, &weight, Value::Null).unwrap();
        layer += 1;
    }
    writer.finish().unwrap();
}

fn compressed(layer: usize, shape: &[i64], values: &[f16], masked_vectors: bool) -> CompressedWeight {
    let bits = BitWidth::ALL[layer % BitWidth::ALL.len()];
    let axis = layer / 6 % 2;
    let channels = shape[axis] as usize;
    let group_size = [1, 2, 4].into_iter().filter(|size| channels.is_multiple_of(*size)).nth(layer % 3).unwrap_or(channels);
    // Depending on the layer, from none to all of its elements are kept, in steps of a tenth.
    let keep: Vec<bool> = (0..values.len()).map(|i| scrambled(i + 31 * layer) % 10 >= layer as u64 % 11).collect();
    if layer % 13 == 12 {
        return CompressedWeight::sparse(shape.to_vec(), &keep, values).unwrap();
    }
    // Some layers have vectors of 2, 3 or 4 output channels.
    let vector_length = [2, 4, 3][layer / 7 % 3];
    if layer % 7 == 5 && (shape[0] as usize).is_multiple_of(vector_length) {
        let groups = if layer.is_multiple_of(2) { 1 } else { shape[0] as usize / vector_length };
        let count = values.len() / vector_length;
        let palettes =
            (0..groups * bits.entries() * vector_length).map(|i| values[scrambled(i) as usize % values.len()]).collect();
        let indices: Vec<u8> = (0..count).map(|i| (scrambled(i + 17) as u8) & bits.max_index()).collect();
        let group_size = shape[0] as usize / groups;
        let codebook = Codebook { bits, axis: 0, group_size, vector_length, palettes, scales: None };
        let keep = (layer % 4 != 3 && masked_vectors).then_some(&keep[..count]);
        return CompressedWeight::palettized(shape.to_vec(), keep, codebook, &indices).unwrap();
    }
    let palettes = (0..channels / group_size * bits.entries()).map(|i| values[scrambled(i) as usize % values.len()]).collect();
    let indices: Vec<u8> = (0..values.len()).map(|i| (scrambled(i + 17) as u8) & bits.max_index()).collect();
    let scale = |row: i64| f16::from_f32(0.5 + (scrambled(row as usize) % 100) as f32 / 100.0);
    let scales = (layer % 5 == 4).then(|| (0..shape[0]).map(scale).collect());
    let keep = (layer % 4 != 3).then_some(&keep[..]);
    let codebook = Codebook { bits, axis, group_size, vector_length: 1, palettes, scales };
    CompressedWeight::palettized(shape.to_vec(), keep, codebook, &indices).unwrap()
}
