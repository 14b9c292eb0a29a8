//! Writes a container with random weights of a model's architecture.
//!
//! The container has as many bytes as a compressed model with these settings. The steps after
//! compression can thus be measured at full size.
//!
//! ```sh
//! cargo run --release --example made_up_container -- \
//!     MODEL_DIR BITS GROUP_SIZE SPARSITY OUT.safetensors
//! ```
//!
//! A GROUP_SIZE of 0 makes one palette for each weight. As in the shipped configs, weights outside
//! the stages are not pruned, and a weight whose channels the groups do not divide stays fp16.
//! BITS may also name the output channels that share an index: `8x2`. They divide a GROUP_SIZE.

use std::path::Path;

use half::f16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sdxl_squeeze::checkpoint::ConfigFile;
use sdxl_squeeze::codebook::{BitWidth, Codebook};
use sdxl_squeeze::container::{CompressedWeight, ContainerInfo, ContainerWriter, Network};
use sdxl_squeeze::model::unet::{UnetChain, UnetConfig};
use sdxl_squeeze::{Error, Result};
use serde_json::{Value, json};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, bits, group_size, sparsity, out] = &args[..] else {
        return Err(Error::Argument("usage: made_up_container MODEL_DIR BITS GROUP_SIZE SPARSITY OUT".into()));
    };
    let wrong = |text: &String| Error::Argument(format!("`{text}` is not a number"));
    let (width, length) = bits.split_once('x').unwrap_or((bits, "1"));
    let vector_length: usize = length.parse().map_err(|_| wrong(bits))?;
    let bits: BitWidth = width.parse().map_err(|_| wrong(bits))?;
    let group_size: usize = group_size.parse().map_err(|_| wrong(group_size))?;
    let sparsity: f64 = sparsity.parse().map_err(|_| wrong(sparsity))?;

    let config = Path::new(model).join("unet/config.json");
    let chain = UnetChain::new(UnetConfig::read(&config)?);
    let info = ContainerInfo {
        network: Network::Unet,
        config: ConfigFile::read(&config)?.into_entries(),
        recipe: json!({ "made_up": { "bits": bits, "group_size": group_size, "sparsity": sparsity } }),
        sources: Vec::new(),
        prediction_type: None,
    };
    let mut writer = ContainerWriter::create(Path::new(out), info)?;
    let mut random = ChaCha8Rng::seed_from_u64(1);
    for tensor in chain.tensors()? {
        let (channels, numel) = (tensor.shape[0] as usize, tensor.numel() as usize);
        let group = if group_size == 0 { channels } else { group_size };
        let fan_in = (numel / channels) as f32;
        if tensor.shape.len() < 2 || !channels.is_multiple_of(group) || !channels.is_multiple_of(vector_length) {
            // Norms and biases get values that keep activations in range.
            let value = if tensor.shape.len() < 2 && tensor.name.ends_with(".weight") { 1.0 } else { 0.01 };
            writer.add_tensor(&tensor.name, &tensor.shape, &vec![f16::from_f32(value); numel])?;
            continue;
        }
        let in_stage = ["down_blocks.", "mid_block.", "up_blocks."].iter().any(|stage| tensor.name.starts_with(stage));
        // The index of an element, or vector of elements, is the low bits of a random byte.
        let numel = numel / vector_length;
        let mut noise = vec![0u8; numel];
        random.fill(&mut noise[..]);
        let indices: Vec<u8> = noise.iter().map(|byte| byte & bits.max_index()).collect();
        let keep: Option<Vec<bool>> = (in_stage && sparsity > 0.0).then(|| {
            let pruned = (numel as f64 * sparsity) as usize;
            // Pruned elements are spread evenly: element i is pruned if `before(i + 1)` exceeds
            // `before(i)`.
            let before = |i: usize| i * pruned / numel;
            (0..numel).map(|i| before(i) == before(i + 1)).collect()
        });
        let entry = |_| f16::from_f32(random.random_range(-1.7..1.7) / fan_in.sqrt());
        let palettes = (0..channels / group * bits.entries() * vector_length).map(entry).collect();
        let codebook = Codebook { bits, axis: 0, group_size: group, vector_length, palettes, scales: None };
        let weight = CompressedWeight::palettized(tensor.shape.clone(), keep.as_deref(), codebook, &indices)?;
        writer.add_weight(&tensor.name, &weight, Value::Null)?;
    }
    writer.finish().map(drop)
}
