//! Reads a safetensors file with all its tensors, and a checkpoint that consists of this file.

use sdxl_squeeze::checkpoint::{SafetensorsFile, Weights, read_tensor};
use sdxl_squeeze::device::Placement;
use tch::{Device, Kind};

use crate::choices::Choices;
use crate::{layout, scratch};

const NAMES: [&str; 5] = ["conv_in.weight", "conv_in.bias", "a", "__metadata__", ""];

/// Runs one input: a file, a header and data, or decisions for building a file.
pub fn run(data: &[u8]) {
    let mut choices = Choices(data);
    let file = match choices.below(3) {
        0 => choices.rest().to_vec(),
        1 => {
            let header = usize::from(choices.short());
            let rest = choices.rest();
            let (header, data) = rest.split_at(header.min(rest.len()));
            layout::with_header(header, data)
        }
        _ => {
            let count = choices.below(6);
            let tensors: Vec<_> = (0..count).map(|_| layout::Tensor::any(&mut choices, &NAMES)).collect();
            layout::file(None, &tensors)
        }
    };
    let path = scratch::file("model.safetensors", &file);
    let placement = Placement { device: Device::Cpu, kind: Kind::Float };
    if let Ok(opened) = SafetensorsFile::open(&path) {
        for (name, entry) in opened.entries() {
            assert!(entry.start() + entry.bytes() <= file.len() as u64);
            if let Ok(tensor) = read_tensor(&opened, name, placement) {
                assert_eq!(tensor.size(), entry.shape);
            }
            let _ = opened.read(name);
        }
    }
    if let Ok(weights) = Weights::open(scratch::folder(), "model", str::to_owned) {
        let _ = weights.dtype();
        let _ = weights.check(&[], |name| name.len() == 1);
        for (name, _) in weights.entries() {
            let _ = weights.narrow_bytes(name, placement);
        }
    }
}
